"""Decides which workers caused a failure, and for how long plans exclude them."""
