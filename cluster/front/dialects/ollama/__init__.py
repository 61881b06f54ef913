"""Ollama's API over the one served model."""
