from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.cluster.scheduler.requests import Failed
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.sampler.results import NOT_FINITE


@dataclass(frozen=True, slots=True)
class RowFault:
    """A sequence whose rows failed twice in the last stage, although the stage received finite hidden states."""

    key: int
    failure: str


class Retry(Enum):
    AGAIN = auto()  # The same workers compute the sequence again.
    # The sequence is computed again, and another worker should take the last stage.
    ELSEWHERE = auto()
    NEVER = auto()
    # The sequence fails. The worker that was suspected is not at fault.
    FAILED_ELSEWHERE = auto()


@dataclass(slots=True)
class Retries:
    """Decides if and how a failed sequence is computed again: first in other KV blocks, then if possible with another
    worker as the last stage."""

    count: int = 0

    def failed(self, sequence: Sequence, failed: Failed, *, suspects_workers: bool) -> Retry:
        may_be_worker = not sequence.request.needs_matcher or failed.message.startswith(NOT_FINITE)
        if failed.is_request_fault or not may_be_worker:
            return Retry.NEVER if failed.is_request_fault or sequence.failures else self._again(sequence)
        if sequence.failures > 1:
            return Retry.FAILED_ELSEWHERE
        if sequence.failures and not suspects_workers:
            return Retry.NEVER
        return self._again(sequence, is_checked=suspects_workers)

    def _again(self, sequence: Sequence, *, is_checked: bool = False) -> Retry:
        retry = Retry.ELSEWHERE if sequence.failures else Retry.AGAIN
        sequence.failures += 1
        sequence.is_checked = is_checked
        self.count += 1
        return retry
