"""Prepared studies as batches for training."""
