"""Computes each kernel's launch (arguments, grid, shared memory) from addresses and sizes alone."""
