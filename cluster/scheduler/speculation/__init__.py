"""Speculative decoding: one pass computes drafted tokens with a known token, and can choose several tokens."""
