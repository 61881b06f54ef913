"""Draws random faults and pauses from a seed. Uses no clock and no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from llamaclust.core.errors import UsageError
from llamaclust.tools.chaos.worker_faults import FAILING_S, MUTE_S

_BETWEEN_S = (0.5, 3.0)
_LOST_S = (0.1, 10.0)
"""Minimum and maximum seconds for which a worker is stopped or cut off, drawn log-uniformly. `timeouts.worker` is
between them, so the worker is sometimes only late and sometimes lost."""
_DRAINED_S = (0.5, 5.0)
_COORDINATOR_STOPPED_S = (0.1, 4.0)
"""Minimum and maximum seconds for which the coordinator is stopped. Both are below `timeouts.worker`."""
_FULL_S = (0.5, 5.0)
_SLOW_S = (0.5, 8.0)
_LOSSES = 5
_WITHIN_S = 75.0
"""A worker is lost at most `_LOSSES` times in this time, because launchers limit restarts to six a minute."""


class FaultKind(StrEnum):
    KILL = "SIGKILL of a worker"
    STOP = "SIGSTOP of a worker"
    DRAIN = "drain of a worker"
    COORDINATOR_KILL = "SIGKILL of the coordinator"
    COORDINATOR_STOP = "SIGSTOP of the coordinator"
    DISK_FULL = "full disk of the coordinator"
    PARTITION = "partition of a worker"
    SLOW_LINK = "slow link of a worker"
    FAILS = "failing steps of a worker"
    MUTE = "silence of a worker"

    @property
    def option(self) -> str:
        return self.name.lower().replace("_", "-")

    @property
    def is_of_link(self) -> bool:
        return self in (FaultKind.PARTITION, FaultKind.SLOW_LINK)

    @property
    def needs_another_worker(self) -> bool:
        return self in (FaultKind.STOP, FaultKind.DRAIN, FaultKind.PARTITION, FaultKind.FAILS, FaultKind.MUTE)

    @property
    def is_loss(self) -> bool:
        return self in (FaultKind.KILL, FaultKind.STOP, FaultKind.PARTITION, FaultKind.MUTE)


def fault_kinds(text: str | None = None) -> frozenset[FaultKind]:
    """Parses a list of kinds such as `kill,stop`. None stands for all kinds. Raises UsageError for an unknown kind."""
    kinds = {kind.option: kind for kind in FaultKind}
    names = list(kinds) if text is None else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in kinds]:
        raise UsageError(f"--faults: unknown kind {unknown[0]!r}; choose from {', '.join(kinds)}")
    return frozenset(kinds[name] for name in names)


_WEIGHTS = {
    FaultKind.KILL: 5,
    FaultKind.STOP: 3,
    FaultKind.DRAIN: 2,
    FaultKind.COORDINATOR_KILL: 2,
    FaultKind.COORDINATOR_STOP: 1,
    FaultKind.DISK_FULL: 1,
    FaultKind.PARTITION: 2,
    FaultKind.SLOW_LINK: 2,
    FaultKind.FAILS: 2,
    FaultKind.MUTE: 2,
}
_HOLDS_S = {
    FaultKind.FAILS: (FAILING_S, FAILING_S),
    FaultKind.MUTE: (MUTE_S, MUTE_S),
    FaultKind.DRAIN: _DRAINED_S,
    FaultKind.COORDINATOR_STOP: _COORDINATOR_STOPPED_S,
    FaultKind.DISK_FULL: _FULL_S,
    FaultKind.SLOW_LINK: _SLOW_S,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault. `target` is a worker's name, or the cluster's name for a fault of the coordinator. `hold_s` is the
    duration in seconds, or 0 for a kill."""

    kind: FaultKind
    target: str
    hold_s: float = 0.0

    def __str__(self) -> str:
        held = f" for {self.hold_s:.1f} s" if self.hold_s else ""
        return f"{self.kind.value.partition(' of ')[0]} {self.target}{held}"


class Schedule:
    def __init__(self, seed: int) -> None:
        self._source = Random(seed)
        self._losses_s: dict[str, deque[float]] = {}

    def pause_s(self) -> float:
        return self._source.uniform(*_BETWEEN_S)

    def next_fault(
        self,
        now_s: float,
        targets: Mapping[FaultKind, Sequence[str]],
        connected: Iterable[str],
        held: Iterable[str] = (),
    ) -> Fault | None:
        """Draws a fault for a target, or returns None if no fault is possible. Targets in `held` are skipped, because
        they have a lasting fault. A fault that needs another worker requires two `connected` workers outside `held`."""
        kind_draw, target_draw, hold_draw = (self._source.random() for _ in range(3))
        busy = frozenset(held)
        leaves_one = len(frozenset(connected) - busy) > 1
        kinds = [kind for kind in FaultKind if leaves_one or not kind.needs_another_worker]
        able = {kind: names for kind in kinds if (names := self._able(kind, now_s, targets, busy))}
        if not able:
            return None
        kind = _pick(list(able), [_WEIGHTS[kind] for kind in able], kind_draw)
        target = able[kind][int(target_draw * len(able[kind]))]
        if kind.is_loss:
            self._losses_s.setdefault(target, deque(maxlen=_LOSSES)).append(now_s)
        return Fault(kind, target, _hold_s(kind, hold_draw))

    def _able(
        self, kind: FaultKind, now_s: float, targets: Mapping[FaultKind, Sequence[str]], held: frozenset[str]
    ) -> list[str]:
        names = [name for name in sorted(targets.get(kind, ())) if name not in held]
        return [name for name in names if self._has_restarts(name, now_s)] if kind.is_loss else names

    def _has_restarts(self, name: str, now_s: float) -> bool:
        losses_s = self._losses_s.get(name, ())
        return sum(now_s - loss_s <= _WITHIN_S for loss_s in losses_s) < _LOSSES


def _pick(kinds: Sequence[FaultKind], weights: Sequence[int], draw: float) -> FaultKind:
    left = draw * sum(weights)
    for kind, weight in zip(kinds, weights, strict=True):
        left -= weight
        if left < 0:
            return kind
    return kinds[-1]


def _hold_s(kind: FaultKind, draw: float) -> float:
    if kind in (FaultKind.STOP, FaultKind.PARTITION):
        low_s, high_s = _LOST_S
        return float(low_s * (high_s / low_s) ** draw)
    low_s, high_s = _HOLDS_S.get(kind, (0.0, 0.0))
    return low_s + (high_s - low_s) * draw
