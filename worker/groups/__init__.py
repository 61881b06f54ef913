"""Links between the members of a group: listening, opening, verification and gathers."""
