"""The `llamaclust` command, one file a command group."""
