"""The CUDA device: memory, launches and graphs through CuPy; kernels compiled by NVRTC."""
