"""The arguments, grids and shared memory of each kernel: pure functions of addresses and sizes."""
