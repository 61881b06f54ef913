"""Control messages between the coordinator and workers, and their codec."""
