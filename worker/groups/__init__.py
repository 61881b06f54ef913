"""Links between the members of a group: their listener, how they are opened and verified, and gathers over them."""
