"""A worker process, with its layers, KV memory and gRPC services."""
