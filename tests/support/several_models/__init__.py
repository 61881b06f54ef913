"""Clusters of processes, fakes of stages, served models."""
