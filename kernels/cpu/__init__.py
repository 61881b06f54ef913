"""The CPU backend: C++ kernels for each feature level. One native call computes a whole program."""
