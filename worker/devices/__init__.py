"""The processor and GPUs of a worker, their memory and speed."""
