"""The cluster file and the environment variables as checked values."""
