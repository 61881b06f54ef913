"""The `llamaclust` command. Each group of commands has a file or a folder."""
