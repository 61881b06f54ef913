"""Searches for plans in which groups of workers may hold stages."""
