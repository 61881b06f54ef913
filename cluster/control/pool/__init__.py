"""Manages the workers of a cluster: their events, drains and measurements."""
