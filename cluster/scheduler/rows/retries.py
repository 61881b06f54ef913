"""Rows without a result, such as those whose logits are not finite: computed again, then elsewhere. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.cluster.scheduler.requests import Failed
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.sampling import NOT_FINITE


@dataclass(frozen=True, slots=True)
class RowFault:
    """The last stage gave no result for rows of a sequence, twice, although what it received was finite."""

    key: int
    failure: str


@dataclass(slots=True)
class Retries:
    """A sequence is computed again in other KV blocks; a second failure is the last stage's, where another worker may
    take its place; a third one ends the sequence. A grammar that an answer breaks is no worker's fault."""

    suspects_workers: bool = False
    count: int = 0
    fault: RowFault | None = None

    def is_tried_again(self, sequence: Sequence, failed: Failed) -> bool:
        if failed.is_request_fault:
            return False
        may_be_worker = not sequence.request.needs_matcher or failed.message.startswith(NOT_FINITE)
        is_suspicious = self.suspects_workers and may_be_worker
        if sequence.failures > (1 if is_suspicious else 0):
            return False
        if sequence.failures:
            self.fault = RowFault(sequence.key, failed.message)
        sequence.failures += 1
        sequence.is_checked = is_suspicious
        self.count += 1
        return True

    def take_fault(self) -> RowFault | None:
        fault, self.fault = self.fault, None
        return fault
