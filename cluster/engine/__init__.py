"""Runs requests: connects the scheduler with the pipeline of stages that compute."""
