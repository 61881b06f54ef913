"""Excludes workers that failed repeatedly from plans for a limited time, unless no plan is possible without them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, replace

from llamaclust.core.backoff import Backoff

_BACKOFF = Backoff(first_s=10.0, max_s=600.0)
_RETRY = Backoff(first_s=0.25, max_s=5.0)
_IGNORED = Backoff(first_s=60.0, max_s=3600.0)
_FREE = 1  # The first failure is free, because a request may have caused it.
_REMEMBERED_S = 600.0
_MOST_RECORDS = 1000
_PAUSES_REMEMBERED = 10
"""A failure is remembered after its exclusion for this multiple of the exclusion's length, at least `_REMEMBERED_S`."""


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """Failures of a worker. The `requests` were in flight at every failure, so one may be the cause."""

    failures: int
    pause_s: float
    end_s: float
    reason: str  # Reason of the last failure.
    requests: frozenset[int] = frozenset()
    # Number of failures, in quick succession, while plans used the excluded worker because others did not suffice.
    failures_within: int = 0
    retry_at_s: float = 0.0  # Earliest time to load a plan with this worker again.

    def failed_within(self, reason: str, requests: frozenset[int], now_s: float) -> FailureRecord:
        """Returns the record after one more failure. This failure happened while a plan used the excluded worker."""
        before = self.failures_within
        if before and now_s - self.retry_at_s > _RETRY.pause_s(before - 1):
            before = 0
        return replace(
            self,
            reason=reason,
            requests=self.requests & requests,
            failures_within=before + 1,
            retry_at_s=now_s + _RETRY.pause_s(before),
        )

    def is_forgotten(self, now_s: float) -> bool:
        return now_s > self.end_s + max(_REMEMBERED_S, _PAUSES_REMEMBERED * self.pause_s)

    @property
    def text(self) -> str:
        return f"it failed {self.failures} times, last: {self.reason}"


@dataclass(frozen=True, slots=True)
class Quarantine:
    # Records by worker name. The newest record is the last one.
    records: Mapping[str, FailureRecord] = field(default_factory=dict)
    ignored: int = 0  # Number of requests that failed on all workers.
    ignored_until_s: float = 0.0

    def failed(
        self, name: str, reason: str, requests: frozenset[int], now_s: float, *, is_repeated: bool = False
    ) -> Quarantine:
        """Adds a worker's failure. `is_repeated` is true if the worker has failed on the same tokens before."""
        return self._add(name, reason, requests, now_s, least=_FREE + is_repeated)

    def exclude(self, name: str, reason: str, now_s: float) -> Quarantine:
        return self._add(name, reason, frozenset(), now_s, least=_FREE + 1)

    def _add(self, name: str, reason: str, requests: frozenset[int], now_s: float, *, least: int) -> Quarantine:
        records = self._kept(now_s)
        before = records.pop(name, None)
        if before is not None and now_s < before.end_s:
            return replace(self, records={**records, name: before.failed_within(reason, requests, now_s)})
        failures = max(least, 1 if before is None else before.failures + 1)
        pause_s = 0.0 if failures <= _FREE else _BACKOFF.pause_s(failures - _FREE - 1)
        suspected = requests if before is None else before.requests & requests
        record = FailureRecord(failures, pause_s, now_s + pause_s, reason, suspected)
        return replace(self, records={**records, name: record})

    def _kept(self, now_s: float) -> dict[str, FailureRecord]:
        kept = [(name, record) for name, record in self.records.items() if not record.is_forgotten(now_s)]
        return dict(kept[-(_MOST_RECORDS - 1) :])

    def release(self, names: Collection[str]) -> Quarantine:
        return replace(self, records={name: record for name, record in self.records.items() if name not in names})

    def exonerate(self, requests: frozenset[int]) -> Quarantine:
        return self.release([name for name, record in self.records.items() if record.requests & requests])

    def release_by_request(self, key: int, now_s: float) -> Quarantine:
        """Ends the exclusion of workers that failed because of request `key`, which fails on every worker."""
        released = self.exonerate(frozenset({key}))
        if len(released.records) == len(self.records):
            return self
        return replace(released, ignored=self.ignored + 1, ignored_until_s=now_s + _IGNORED.pause_s(self.ignored))

    def ignores_rows(self, now_s: float) -> bool:
        return now_s < self.ignored_until_s

    def names(self, now_s: float) -> frozenset[str]:
        return frozenset(name for name, record in self.records.items() if record.end_s > now_s)

    def retry_at_s(self, names: Collection[str]) -> float:
        """Returns the earliest time at which a plan with these workers may be loaded again."""
        return max((self.records[name].retry_at_s for name in names if name in self.records), default=0.0)

    def worst_first(self, names: Set[str]) -> list[str]:
        return sorted(names & self.records.keys(), key=lambda name: (-self.records[name].failures, name))

    def next_end_s(self, now_s: float) -> float | None:
        return min((record.end_s for record in self.records.values() if record.end_s > now_s), default=None)
