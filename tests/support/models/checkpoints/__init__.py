"""Tensor shapes and settings of tiny random checkpoints, by family."""
