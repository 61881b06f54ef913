"""The `plan` command, for configured clusters and for assumed machines."""
