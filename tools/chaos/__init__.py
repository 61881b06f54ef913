"""Fault tests of a running cluster: the `chaos` command."""
