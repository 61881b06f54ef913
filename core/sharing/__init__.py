"""How owners of work share what is scarce: places by turns, room by what is free."""
