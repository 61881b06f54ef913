"""The NumPy backend: slow and obvious, what every kernel is tested against."""
