"""Runs requests. The engine connects the scheduler with the pipeline of stages that compute."""
