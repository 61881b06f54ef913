"""Runs the control loop of each model: makes plans, loads them, and recovers from failures."""
