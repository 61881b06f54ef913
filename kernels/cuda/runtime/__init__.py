"""The CUDA device: memory, launches and graphs through CuPy; kernels are compiled by NVRTC."""
