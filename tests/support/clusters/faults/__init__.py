"""Faults of workers in tests."""
