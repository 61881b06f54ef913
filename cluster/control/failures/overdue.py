"""Finds the stage that delays an overdue result, because a worker that sends heartbeats may hang nevertheless."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from llamaclust.wire.control.messages import StageProgress

_LOOK_S = 1.0
"""Maximum seconds that one call of `OverdueResults.waited_s` adds to the waiting time."""


@dataclass(frozen=True, slots=True)
class PendingResult:
    epoch: int
    number: int
    stage: int


def delaying_stage(number: int, progress: Sequence[StageProgress | None]) -> int:
    """Returns the index of the stage that delays microbatch `number`."""
    last, first, stage = len(progress) - 1, progress[0], 0
    for place, at in enumerate(progress):
        if at is None:  # A stage without a report may have passed the microbatch on.
            continue
        if at.received <= number:
            break
        stage = min(place + (at.sent > number), last)
        if at.sent <= number:
            break
    # If the first stage waits for sampled tokens, the last stage must send them.
    return last if stage == 0 and first is not None and first.awaits_tokens else stage


@dataclass(slots=True)
class OverdueResults:
    # For each overdue result, the seconds counted so far and the time of the last `waited_s` call.
    _waited: dict[PendingResult, tuple[float, float]] = field(default_factory=dict, init=False)

    def waited_s(self, result: PendingResult, now_s: float) -> float:
        """Returns how many seconds the result has been awaited. A pause of this process counts as at most 1 s."""
        if result not in self._waited:
            self._waited = {other: waited for other, waited in self._waited.items() if other.epoch != result.epoch}
        waited_s, last_s = self._waited.get(result, (0.0, now_s))
        waited_s += min(now_s - last_s, _LOOK_S)
        self._waited[result] = waited_s, now_s
        return waited_s

    def keep(self, epochs: Collection[int]) -> None:
        self._waited = {result: waited for result, waited in self._waited.items() if result.epoch in epochs}
