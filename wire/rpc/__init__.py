"""Streams between processes, by gRPC or on Unix sockets: client, server, send queues, deadlines, options."""
