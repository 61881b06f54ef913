"""Shapes and tensors of small random models, by family."""
