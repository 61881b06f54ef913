"""Loads a model's projector, encoder and draft model into this process."""
