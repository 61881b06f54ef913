"""Serves all endpoints over HTTP: connections, TLS, API keys, admission, event streams, and error replies."""
