"""Checkpoint formats that `model convert` reads."""
