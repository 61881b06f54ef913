"""Links between a group's members: listening, opening, verification and gathers."""
