"""Inputs of the planner."""
