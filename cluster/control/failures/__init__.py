"""Failures of serving workers: who is at fault, and for how long plans exclude them."""
