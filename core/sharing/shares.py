"""Room that owners share. Pure."""

from __future__ import annotations


def fits(own: int, held: int, room: int, more: int = 1) -> bool:
    """Returns whether an owner with `own` of all `held` may have `more`: as much as is free then, and `room` at most.
    One alone has all of `room`, several divide less than twice as much, and a newcomer always finds some."""
    return own + more <= min(room, 2 * room - held)
