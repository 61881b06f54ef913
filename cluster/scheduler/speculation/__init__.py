"""Speculation: the drafted tokens that are computed with a known one, so that several are chosen in one pass."""
