"""Weights that are packed into tiles, and the cache of packed weights on disk, for the CPU and CUDA backends."""
