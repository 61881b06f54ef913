"""Support of GPU tests: a GPU shim, and comparisons with the CPU backend."""
