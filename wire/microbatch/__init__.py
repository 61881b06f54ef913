"""Microbatches, sampling inputs and results, and their codec."""
