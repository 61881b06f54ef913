"""Drafted tokens: which ones are computed with a token that is known, so that several are chosen in one pass."""
