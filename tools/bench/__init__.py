"""The measurements of the `bench` command."""
