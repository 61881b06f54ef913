"""The files of a cluster on disk, and the events that it reports."""
