"""The CPU backend, with C++ kernels for each feature level."""
