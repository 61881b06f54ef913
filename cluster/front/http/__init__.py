"""The HTTP server of all endpoints: connections, TLS, API keys, admission, event streams, and error replies."""
