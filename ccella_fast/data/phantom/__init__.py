"""Synthetic studies with reports, for the demo and the tests."""
