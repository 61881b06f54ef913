"""Grammars that answers obey: their forms, their checks, and the tokens that they allow."""
