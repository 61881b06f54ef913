"""The arguments, grid and shared memory of each kernel, as pure functions of addresses and sizes."""
