"""Drafters: what may follow the tokens of a sequence. Pure."""
