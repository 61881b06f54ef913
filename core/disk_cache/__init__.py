"""The cache on disk: its folder, and how its files are opened, written and locked."""
