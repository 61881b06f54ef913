"""The one cache on disk: its folder, and how files in it are opened, written and locked."""
