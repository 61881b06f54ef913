"""Measurements of the `bench` command."""
