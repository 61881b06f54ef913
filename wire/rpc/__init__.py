"""gRPC: client, server, send queues, deadlines, options."""
