"""Speculative decoding. One step computes drafted tokens after a known token, and can choose several tokens."""
