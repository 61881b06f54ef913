"""Speculative decoding: drafted tokens are computed with a known one, so that one pass can choose several tokens."""
