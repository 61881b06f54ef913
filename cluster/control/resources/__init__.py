"""Owns the measured speeds of workers and links, and computes each worker's share of its machine."""
