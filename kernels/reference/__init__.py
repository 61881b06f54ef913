"""The NumPy backend, slow and simple. All other kernels are tested against it."""
