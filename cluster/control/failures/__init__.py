"""Failures of serving workers: which worker caused them, and for how long plans exclude it."""
