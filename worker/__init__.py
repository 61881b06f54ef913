"""A worker process: its layers, its KV memory, its gRPC services."""
