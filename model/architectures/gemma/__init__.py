"""Gemma and what its later versions have in common."""
