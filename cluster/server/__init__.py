"""Runs the coordinator process, and reports its status and metrics."""
