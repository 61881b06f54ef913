"""The arguments, grid and shared memory of each kernel's launch, computed from addresses and sizes alone."""
