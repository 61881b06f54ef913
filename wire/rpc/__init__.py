"""Streams between processes, of gRPC and on Unix sockets: client, server, send queues, deadlines, options."""
