"""The backend for NVIDIA GPUs: CUDA C++ kernels, launched through CuPy. The results have the same bits as on the
CPU."""
