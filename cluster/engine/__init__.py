"""Runs the scheduler on a pipeline: schedule, run, complete."""
