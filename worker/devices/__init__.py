"""What a worker computes on: processor, GPUs, their memory and speed."""
