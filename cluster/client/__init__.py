"""Clients with one interface: over HTTP, and for a model in this process."""
