"""The CUDA device: memory, launches and graphs through CuPy, and kernels compiled by NVRTC."""
