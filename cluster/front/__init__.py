"""Requests of clients: read in the form of any API, computed into logs of answers, shown in the client's form."""
