"""A worker's processor and GPUs, with their memory and speed."""
