"""Launchers. A launcher starts the workers of a cluster, or waits for workers that others start."""
