"""Helpers for tests of arithmetic: backends, batches, exact products and quantized blocks."""
