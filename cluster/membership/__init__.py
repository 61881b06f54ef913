"""Which workers are connected, and how they are admitted."""
