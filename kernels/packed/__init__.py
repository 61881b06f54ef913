"""Weights that are packed into tiles, and their cache on disk, for the CPU and CUDA backends."""
