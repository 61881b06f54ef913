"""Decides which worker caused a failure, and how long plans exclude workers that failed."""
