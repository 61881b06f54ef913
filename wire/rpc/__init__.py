"""Streams between processes over gRPC or Unix sockets: clients, servers, send queues, deadlines and options."""
