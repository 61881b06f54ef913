"""Replies that do not depend on connections: they are kept for clients, and restored after a coordinator's restart."""
