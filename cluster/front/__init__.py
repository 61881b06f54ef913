"""Serves clients. Reads requests of all supported APIs, computes answer logs, and shows them in each API's format."""
