"""Readers of medical image files, and of the folders and lists of studies that they come in."""
