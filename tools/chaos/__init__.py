"""The `chaos` command, which tests a running cluster by injecting faults."""
