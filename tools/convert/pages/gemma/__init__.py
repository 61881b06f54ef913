"""Gemma, and what its E models have in common."""
