"""Speculative decoding. A step computes drafted tokens after a known token, so that it can choose several tokens."""
