"""Speculative decoding: drafted tokens are computed together with a known token, so that one pass can choose several
tokens."""
