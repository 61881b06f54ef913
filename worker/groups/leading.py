"""The leader of a group has the stage's streams, and tells the other members of each step before it computes its own
portion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from llamaclust.core.errors import LlamaclustError, WorkerError
from llamaclust.kernels._native import Gatherer, LinkError, Links
from llamaclust.model.program import Program
from llamaclust.wire.microbatch.messages import SampledTokens
from llamaclust.worker.groups.bands import BandChoice
from llamaclust.worker.groups.checked_gathers import checked_gathers
from llamaclust.worker.groups.member_links import MemberLinks
from llamaclust.worker.groups.step_message import encode_step


class MemberFailedError(LlamaclustError):
    """A member failed within a step, which the others go on to compute: it cannot meet them at gathers any more."""


class Leader:
    """Announces the steps of one epoch, from the opening of the links on. Used by one thread at a time."""

    def __init__(self, epoch: int, links: MemberLinks, gather_by: Callable[[Gatherer], None]) -> None:
        """`gather_by` gives its own stage the links."""
        self._epoch = epoch
        self._member_links = links
        self._gather_by = gather_by
        self._steps = 0
        self._choice = BandChoice()
        self._links: Links | None = None
        links.open(self._start)

    def _start(self, links: Links) -> None:
        self._gather_by(links)
        self._links = links

    @contextmanager
    def step(
        self, frame: bytes, followed: Sequence[SampledTokens], rows: int, checked: Program | None = None
    ) -> Iterator[None]:
        """Sends a microbatch as it came, and the tokens that it follows, to all other members; what the context then
        computes is its step, of so many rows. LinkError where a member does not take it. A WorkerError is what all
        members come to by themselves; any other error is a MemberFailedError. `checked`: the stage's program, if
        numbers were not finite before; a LinkError names the member at fault if they are not again."""
        assert self._links is not None, "a stream is accepted when the links are open"
        self._links.bands = bands = self._choice.of(rows)
        self._links.send_step(self._epoch, self._steps, encode_step(frame, followed, bands))
        self._steps += 1
        waited_s, begun_s = self._links.counters().waited_s, perf_counter()
        try:
            with self._member_links.step(rows), self._checking(checked, rows):
                yield
            waited_s = self._links.counters().waited_s - waited_s
            self._choice.add(rows, waited_s / (perf_counter() - begun_s))
        except (LinkError, WorkerError):
            raise
        except Exception as error:
            raise MemberFailedError(f"{type(error).__name__}: {error}") from error

    @contextmanager
    def _checking(self, program: Program | None, rows: int) -> Iterator[None]:
        links = self._links
        if program is None or links is None:
            yield
            return

        def accuse(place: int) -> None:
            links.close()
            raise self._member_links.not_finite(place)

        self._gather_by(checked_gathers(links, program, rows, accuse))
        try:
            yield
        finally:
            self._gather_by(links)
