"""A GPU shim and the comparison with the CPU backend."""
