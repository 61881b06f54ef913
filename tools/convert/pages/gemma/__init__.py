"""Gemma, and the common parts of its E models."""
