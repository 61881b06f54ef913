"""Launchers, which start workers in different ways."""
