"""Connects workers to the coordinator, and keeps track of them."""
