"""Sampling parameters, and the tasks and results of output rows."""
