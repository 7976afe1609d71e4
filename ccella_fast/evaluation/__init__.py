"""Evaluation of generated volumes."""
