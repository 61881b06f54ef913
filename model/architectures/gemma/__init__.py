"""Architectures of Gemma, and the parts that its later versions share."""
