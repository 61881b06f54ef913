"""Runs a control loop per model, which makes plans, loads stages on workers, and recovers from failures."""
