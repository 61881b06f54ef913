"""A reply as its computation: independent of the connection that it goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.replies.json_body import JsonBody
from llamaclust.cluster.api.replies.ticket import Ticket

_MAX_SLOTS = 130


@dataclass(frozen=True, slots=True)
class Event:
    """A part of a stream: the `data:` line of a server-sent event, or a line of JSON. The events of one slot come in
    the same order whenever the reply is computed; those of different slots mix as they come."""

    slot: int  # index of a choice; one past the last for what belongs to none
    data: bytes


class Reply(Protocol):
    """The reply to one request."""

    is_streamed: bool
    acknowledgement: bytes | None
    """The JSON of a client that does not wait for its reply; None: it waits. The reply is kept for it."""

    @property
    def has_measurements(self) -> bool:
        """Whether its stream shows times, or what the prefix cache had: computed again, it has other bytes."""
        ...

    async def start(self) -> None:
        """Submits the request. Raises what refuses it."""
        ...

    async def wait_first(self) -> None:
        """Waits a moment for the first event. Raises where the request has failed by then."""
        ...

    def events(self) -> AsyncGenerator[Event | None, None]:
        """Of a streamed reply; None each time that nothing came for a while."""
        ...

    async def whole(self) -> JsonBody:
        """The JSON of one that is not streamed, once its answers are there; the caller closes it."""
        ...

    async def aclose(self) -> None:
        """Nothing of it runs afterwards."""
        ...


MakeReply = Callable[[bytes, Ticket], Awaitable[Reply]]
"""An endpoint: the reply to a body. Raises what refuses the body."""


class Position:
    """How many events of each slot a client has. As text in event ids: `3`, or `3-5-0` for several slots."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    @classmethod
    def parse(cls, text: str, param: str) -> Position:
        """HttpError for a text that is none."""
        position = cls()
        parts = text.split("-", _MAX_SLOTS)
        if not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts) or len(parts) > _MAX_SLOTS:
            raise HttpError(400, "bad_event_id", f"{param}: {text[:60]!r} is not the id of an event", param=param)
        position._counts.update({slot: int(part) for slot, part in enumerate(parts)})
        return position

    def add(self, event: Event) -> int:
        """The number of the event within its slot, from 1 on."""
        self._counts[event.slot] += 1
        return self._counts[event.slot]

    def has(self, event: Event, number: int) -> bool:
        """Whether the client has the event of that number."""
        return number <= self._counts[event.slot]

    def __str__(self) -> str:
        last = max(self._counts, default=0)
        return "-".join(str(self._counts[slot]) for slot in range(last + 1))
