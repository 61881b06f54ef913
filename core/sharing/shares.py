"""Room that owners share. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


def fits(own: int, held: int, room: int, more: int = 1) -> bool:
    """Returns whether an owner with `own` of all `held` may have `more`: it then has `room` at most, and no more than
    stays free of twice `room`, one unit apart. One alone may have all of `room`, all together have at most twice as
    much, and one without any gets up to half of what is free."""
    return not more or own + more <= min(room, 2 * room - held - more + 1)


class Shares:
    """Units of one room, and the owners that hold them; `fits` says who may have more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held = Counter[str]()  # by owner

    def fits(self, owner: str, more: int = 1) -> bool:
        return fits(self.held[owner], self.held.total(), self.room, more)

    def take(self, owner: str, units: int) -> None:
        """Adds units to an owner's share; negative ones are given back."""
        self.held[owner] += units
        if not self.held[owner]:
            del self.held[owner]

    @contextmanager
    def holding(self, owner: str, units: int) -> Iterator[None]:
        """The owner has these units meanwhile."""
        self.take(owner, units)
        try:
            yield
        finally:
            self.take(owner, -units)
