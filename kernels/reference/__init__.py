"""The NumPy backend, slow and obvious, which every kernel is tested against."""
