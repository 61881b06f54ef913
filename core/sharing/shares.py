"""Room that owners share. Pure."""

from __future__ import annotations


def fits(own: int, held: int, room: int, more: int = 1) -> bool:
    """Returns whether an owner with `own` of all `held` may have `more`: it then has `room` at most, and no more than
    stays free of twice `room`, one unit apart. One alone may have all of `room`, all together have at most twice as
    much, and one without any gets up to half of what is free."""
    return not more or own + more <= min(room, 2 * room - held - more + 1)
