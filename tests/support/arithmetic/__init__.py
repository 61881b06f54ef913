"""Backends, batches, exact products and quantized blocks."""
