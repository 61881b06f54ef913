"""A worker process with its layers, its KV memory and its gRPC services."""
