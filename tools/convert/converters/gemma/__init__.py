"""Converters of Gemma models, and functions for the per-layer embeddings of E2B and E4B models."""
