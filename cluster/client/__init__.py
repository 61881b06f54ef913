"""Clients with one interface, for servers over HTTP and for a model in this process."""
