"""Arguments, grids and shared memory of each kernel. Pure: knows addresses only."""
