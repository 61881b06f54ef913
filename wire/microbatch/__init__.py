"""Microbatches, sampling inputs and results, and their codecs."""
