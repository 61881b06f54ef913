"""Values that every layer uses, without I/O: errors, logs, sizes, limits, sampling parameters, GPUs."""
