"""Types and functions that every layer uses: errors, logs, sizes, limits, sampling parameters and GPUs."""
