"""A worker as a member of groups: its links to the other members."""
