"""Reads the cluster file and the environment variables, and checks their values."""
