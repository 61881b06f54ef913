"""Architectures of Gemma, and the parts that several of them share."""
