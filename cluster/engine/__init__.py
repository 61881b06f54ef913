"""Runs requests. Its engine connects the scheduler with the pipeline that computes."""
