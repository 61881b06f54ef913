"""Adapters made for tests."""
