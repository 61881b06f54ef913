"""Searches for plans in which groups of workers can hold stages."""
