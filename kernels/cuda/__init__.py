"""The backend for NVIDIA GPUs: CUDA C++ kernels that give the bits of `kernels.cpu`, launched through CuPy."""
