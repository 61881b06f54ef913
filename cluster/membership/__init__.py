"""The workers that are connected, and their admission."""
