"""The `bench` command's measurements."""
