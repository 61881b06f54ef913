"""Serves the HTTP APIs. Reads requests, runs them on the engine, and formats the answers as each API requires."""
