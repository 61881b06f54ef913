"""A member's links in one epoch. They may open while other members still load, and close with the stage."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from llamaclust.core.errors import DeadlineError, LlamaclustError, ProtocolError, WorkerError
from llamaclust.kernels._native import Gatherer, LinkError, Links
from llamaclust.model.program import Program
from llamaclust.wire.control.groups import GroupCounters, GroupFault, GroupOrder
from llamaclust.wire.control.messages import Deadlines, PeerUnreachable
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.groups.checked_gathers import checked_gathers
from llamaclust.worker.groups.link_opener import LinkOpener, MemberLostError

_LOADS_S = 86400.0
"""Time limit for opening links while members load. The coordinator unloads this stage to end the wait earlier."""

_MOST_PAUSE_S = 60.0
"""Maximum pause in seconds between two reports about a member that cannot be reached."""
_LEAST_ANSWER_S = 1.0  # An answer may take this long on a lossy link or a busy machine.

Fault = GroupFault | PeerUnreachable
Report = Callable[[Fault], Awaitable[None]]


def _retrieved(opening: asyncio.Task[None]) -> None:
    if not opening.cancelled():
        opening.exception()


class MemberLinks:
    """The links of a stage. Reports to the coordinator if the links break before `close` is called."""

    def __init__(self, epoch: int, order: GroupOrder, opener: LinkOpener, deadlines: Deadlines, report: Report) -> None:
        self._epoch, self._order, self._opener, self._report = epoch, order, opener, report
        self._gather_s = deadlines.forward_s
        self._answer_s = max(deadlines.peer_s / 2, _LEAST_ANSWER_S)
        self._links: Links | None = None
        self._is_closed = False
        self._opening: asyncio.Task[None] | None = None
        self._one_row = 0, 0.0  # (number of steps with one row, seconds that their gathers waited).

    def open(self, on_open: Callable[[Links], None]) -> None:
        self._opening = asyncio.create_task(self._open_or_give_up(on_open))
        self._opening.add_done_callback(_retrieved)

    async def _open_or_give_up(self, on_open: Callable[[Links], None]) -> None:
        try:
            await self._open(on_open)
        except Exception as error:
            await self._tell(self.fault(error))
            raise

    async def _open(self, on_open: Callable[[Links], None]) -> None:
        opening = asyncio.create_task(self._opener.open(self._gather_s, _LOADS_S, self._answer_s))
        pause_s = self._answer_s
        try:
            while not opening.done():
                await asyncio.wait([opening], timeout=pause_s)
                for worker, reason in self._opener.unreached(self._answer_s):
                    await self._tell(PeerUnreachable(self._epoch, worker, reason))
                    pause_s = min(2 * pause_s, _MOST_PAUSE_S)
        finally:
            opening.cancel()
        self._links = opening.result()
        if self._is_closed:
            self._links.close()
        else:
            on_open(self._links)

    async def opened(self, seconds: float) -> None:
        """Waits until the links are open. Raises WorkerError if a member is still missing after `seconds` seconds."""
        assert self._opening is not None
        try:
            async with deadline("the links of a group", seconds):
                await asyncio.shield(self._opening)
        except DeadlineError as late:
            if (missing := self._opener.missing) is None:
                raise  # No member is missing, so the error names none.
            worker, reason = missing
            raise WorkerError(f"{reason}, after {seconds:g} s", worker=worker) from late

    @property
    def counters(self) -> GroupCounters | None:
        if self._links is None:
            return None
        links = self._links.counters()
        waited_for_s = tuple(links.waited_for_s)
        return GroupCounters(
            links.gathers, links.waited_s, waited_for_s, links.sent_bytes, links.received_bytes, *self._one_row
        )

    @contextmanager
    def step(self, rows: int) -> Iterator[None]:
        """Wraps one step. Counts steps with one row (decode) and the time that their gathers wait. Not thread-safe."""
        assert self._links is not None, "no step begins before the links are open"
        begun_s = self._links.counters().waited_s
        yield
        if rows == 1:
            steps, waited_s = self._one_row
            self._one_row = steps + 1, waited_s + self._links.counters().waited_s - begun_s

    @contextmanager
    def checking(self, program: Program | None, rows: int, gather_by: Callable[[Gatherer], None]) -> Iterator[None]:
        """Wraps one step. If `program` (the stage's) is given, a LinkError names a member that sends NaN or infinity.
        All members check, because one report alone does not show who is at fault."""
        links = self._links
        if program is None or links is None:
            yield
            return

        def accuse(place: int) -> None:
            raise self._not_finite(place)

        gather_by(checked_gathers(links, program, rows, self._order.member, accuse))
        try:
            yield
        finally:
            gather_by(links)

    def close(self) -> None:
        """Closes the links. This also ends a gather in progress on another thread."""
        self._is_closed = True
        if self._opening is not None:
            self._opening.cancel()
        if self._links is not None:
            self._links.close()

    @property
    def computing_s(self) -> float:
        """Seconds since this member last waited for another member. 0.0 while it waits, and before the first step."""
        return 0.0 if self._links is None else self._links.computing_s

    def fault(self, error: Exception) -> Fault:
        """Returns a report of an error that ended this member's work. The report names the member at fault."""
        if isinstance(error, LinkError) and error.place >= 0:
            worker = self._order.members[error.place].worker
            if error.kind == "unreachable":
                return PeerUnreachable(self._epoch, worker, str(error))
            return GroupFault(self._epoch, worker, error.kind, str(error))
        if isinstance(error, MemberLostError) and error.worker is not None:
            return GroupFault(self._epoch, error.worker, "late", str(error))
        if isinstance(error, ProtocolError):
            return GroupFault(self._epoch, self._order.members[0].worker, "wrong", str(error))
        own = self._order.members[self._order.member].worker
        text = str(error) if isinstance(error, LlamaclustError) else f"{type(error).__name__}: {error}"
        return GroupFault(self._epoch, own, "failed", text)

    def _not_finite(self, place: int) -> LinkError:
        error = LinkError(f"worker {self._order.members[place].worker} twice computed numbers that are not finite")
        error.place, error.kind = place, "wrong"
        return error

    async def give_up(self, error: Exception) -> Fault:
        """Reports `error` and closes the links. A LinkError leaves them open, so that others learn who is at fault."""
        fault = self.fault(error)
        await self._tell(fault)
        if not isinstance(error, LinkError):
            self.close()
        return fault

    async def _tell(self, fault: Fault) -> None:
        if not self._is_closed:
            await self._report(fault)
