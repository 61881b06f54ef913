"""The backend for NVIDIA GPUs: CUDA C++ kernels with the bits of `kernels.cpu`, launched through CuPy."""
