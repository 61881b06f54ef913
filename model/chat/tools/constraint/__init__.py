"""The grammar of an answer's calls."""
