"""One worker process: the layers it holds, its KV memory, its gRPC services."""
