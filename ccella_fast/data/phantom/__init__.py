"""Synthetic studies with reports, for the demonstration and the tests."""
