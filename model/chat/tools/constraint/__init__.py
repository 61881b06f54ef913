"""Grammars for the tool calls in an answer."""
