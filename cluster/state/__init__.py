"""What a cluster keeps on disk, and the events that it reports."""
