"""The backend for NVIDIA GPUs: CUDA C++ kernels, launched through CuPy, with the same bits as `kernels.cpu`."""
