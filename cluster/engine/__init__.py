"""Runs the scheduler on a pipeline."""
