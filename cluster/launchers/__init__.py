"""The ways to start workers, a file each."""
