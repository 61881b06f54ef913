"""Settings of a process that its main function makes once."""
