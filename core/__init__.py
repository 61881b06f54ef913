"""Values that every layer speaks, without I/O: errors, logs, sizes, limits, sampling parameters, GPUs."""
