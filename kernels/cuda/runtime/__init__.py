"""The CUDA device: memory, launches and graphs through CuPy, with kernels that NVRTC compiles."""
