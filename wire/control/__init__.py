"""Control messages between coordinator and workers, and their codec."""
