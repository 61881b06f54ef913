"""Retries rows without a result, such as rows whose logits are not finite: on the same workers, then on others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.cluster.scheduler.requests import Failed
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.sampling import NOT_FINITE


@dataclass(frozen=True, slots=True)
class RowFault:
    """The last stage failed twice on a sequence's rows, although it received finite hidden states."""

    key: int
    failure: str


class Retry(Enum):
    AGAIN = auto()  # it is computed again by the same workers
    ELSEWHERE = auto()  # it is computed again, and another worker should take the last stage
    NEVER = auto()  # it ends
    FAILED_ELSEWHERE = auto()  # it ends: the worker that was suspected for it is not at fault


@dataclass(slots=True)
class Retries:
    """Computes a failed sequence again in other KV blocks, and then on another last worker if possible. After that, the
    sequence ends. If a sequence has a matcher, a worker can be at fault only if logits are not finite."""

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
