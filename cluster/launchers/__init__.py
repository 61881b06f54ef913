"""Ways to start workers, a file each."""
