"""Links between the members of a group: listener, opening, verification, and gathers."""
