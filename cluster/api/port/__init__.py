"""The API's port: its socket, its certificate, TLS under HTTP."""
