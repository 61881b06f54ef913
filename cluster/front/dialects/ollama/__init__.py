"""Ollama's API for the served models."""
