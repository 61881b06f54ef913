"""Arguments, grid and shared memory of each kernel's launch, as pure functions of addresses and sizes."""
