"""Grammars for answers: definitions, checks, and the tokens that a grammar allows."""
