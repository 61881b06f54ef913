"""Clusters of processes, fake stages and served models."""
