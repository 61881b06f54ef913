"""Runs requests: sends the scheduler's microbatches through the pipeline of stages, and delivers the results."""
