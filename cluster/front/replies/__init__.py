"""Replies apart from their connections: kept for clients that are cut off, restored after a coordinator's end."""
