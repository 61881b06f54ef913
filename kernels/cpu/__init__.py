"""The CPU backend: C++ kernels per feature level, a whole program in one native call."""
