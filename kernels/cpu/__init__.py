"""The CPU backend: C++ kernels per feature level; one native call computes a whole program."""
