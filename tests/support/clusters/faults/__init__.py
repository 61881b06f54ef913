"""Faults of workers that tests start."""
