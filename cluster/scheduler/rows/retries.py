"""Rows without a result, such as those whose logits are not finite: they are computed again, then elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.cluster.scheduler.requests import Failed
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.sampling import NOT_FINITE


@dataclass(frozen=True, slots=True)
class RowFault:
    """A second failure of the last stage on rows of a sequence, although what it received was finite."""

    key: int
    failure: str


class Retry(Enum):
    AGAIN = auto()  # it is computed again by the same workers
    ELSEWHERE = auto()  # it is computed again, and another worker should take the last stage
    NEVER = auto()  # it ends
    FAILED_ELSEWHERE = auto()  # it ends: the worker that was suspected for it is not at fault


@dataclass(slots=True)
class Retries:
    """Repeats a failed sequence in other KV blocks, then if possible on another worker for the last stage, then ends
    it. A grammar that an answer breaks is no worker's fault."""

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
