"""Keeps a cluster's files on disk, and defines the events that a coordinator reports."""
