"""Fair shares of a limited resource that is counted in units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


def largest_share(own: int, held: int, room: int) -> int:
    """Returns how many units an owner may hold: `room` minus half of the other owners' units (`held` - `own`)."""
    return max(0, room - (held - own) // 2)


def fits(own: int, held: int, room: int, more: int = 1) -> bool:
    """Returns True if an owner that holds `own` of all `held` units may take `more` units."""
    return not more or own + more <= largest_share(own, held, room)


class Shares:
    def __init__(self, room: int) -> None:
        self.room = room
        self.held = Counter[str]()  # Units held by each owner.

    def fits(self, owner: str, more: int = 1) -> bool:
        return fits(self.held[owner], self.held.total(), self.room, more)

    def take(self, owner: str, units: int) -> None:
        self.held[owner] += units
        if not self.held[owner]:
            del self.held[owner]

    @contextmanager
    def holding(self, owner: str, units: int) -> Iterator[None]:
        self.take(owner, units)
        try:
            yield
        finally:
            self.take(owner, -units)
