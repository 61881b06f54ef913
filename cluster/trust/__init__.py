"""Who may be a worker of a cluster over machines: its certificate authority, and the port where they ask."""
