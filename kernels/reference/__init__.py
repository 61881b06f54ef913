"""The NumPy backend, which is slow and simple. All other kernels are tested against it."""
