"""The HTTP server below all endpoints: connections, TLS, keys, admission, events, errors as replies."""
