"""The results of a run: comparisons with undisturbed answers, and pauses after faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

from llamaclust.core.sizes import counted
from llamaclust.tools.chaos.received import Answer, Received
from llamaclust.tools.chaos.schedule import FaultKind

_WATCH_S = 30.0
"""A pause between tokens belongs to a fault if the pause begins within this time after the fault."""


@dataclass(slots=True)
class Comparison:
    answers: int = 0
    tokens: int = 0
    lost: int = 0
    changed: int = 0  # Tokens with another id or other logprob bits, and tokens after the undisturbed answer's end.
    misplaced: int = 0  # Number of events that were duplicated or skipped.

    def add(self, expected: Answer, answer: Answer) -> None:
        self.answers += 1
        self.tokens += len(answer)
        self.lost += max(0, len(expected) - len(answer))
        self.changed += max(0, len(answer) - len(expected))
        self.changed += sum(row != other for row, other in zip(expected, answer, strict=False))

    def add_request(self, expected: Received, received: Received) -> None:
        for index in sorted(expected.choices.keys() | received.choices.keys()):
            self.add(expected.choices.get(index, []), received.choices.get(index, []))
        self.misplaced += received.misplaced

    @property
    def is_intact(self) -> bool:
        return not self.lost and not self.changed and not self.misplaced

    def __str__(self) -> str:
        events = f"; {counted(self.misplaced, 'event')} duplicated or skipped" if self.misplaced else ""
        compared = f"{counted(self.answers, 'answer')}, {counted(self.tokens, 'token')}"
        return f"{compared}: {self.lost} lost, {self.changed} changed{events}"


@dataclass(slots=True)
class Pauses:
    """The longest pause without any token after each fault."""

    _last_s: float | None = None
    _open: list[tuple[float, FaultKind]] = field(default_factory=list)  # Faults since the last token, with their times.
    _longest: list[tuple[FaultKind, float]] = field(default_factory=list)
    _latest: tuple[float, int] | None = None  # Last fault that a token followed: time and index in `_longest`.

    def fault(self, kind: FaultKind, now_s: float) -> None:
        self._open.append((now_s, kind))

    def token(self, now_s: float) -> None:
        if self._latest is not None and self._last_s is not None and self._last_s - self._latest[0] < _WATCH_S:
            place = self._latest[1]
            kind, longest_s = self._longest[place]
            end_s = self._open[0][0] if self._open else now_s
            self._longest[place] = kind, max(longest_s, end_s - self._last_s)
        for at_s, kind in self._open:
            self._latest = at_s, len(self._longest)
            self._longest.append((kind, now_s - at_s))
        self._open.clear()
        self._last_s = now_s

    def by_kind(self) -> dict[FaultKind, list[float]]:
        found: dict[FaultKind, list[float]] = {}
        for kind, seconds in self._longest:
            found.setdefault(kind, []).append(seconds)
        return found


@dataclass(slots=True)
class Tally:
    seed: int
    faults: Counter[FaultKind] = field(default_factory=Counter)
    compared: Comparison = field(default_factory=Comparison)
    pauses: Pauses = field(default_factory=Pauses)
    errors: Counter[str] = field(default_factory=Counter)  # Number of answers that ended with each error.

    @property
    def is_success(self) -> bool:
        return self.compared.is_intact and self.compared.answers > 0 and self.faults.total() > 0

    def verdict(self) -> Iterator[str]:
        compared = self.compared
        result = "nothing lost, nothing changed" if self.is_success else "NOTHING TESTED; give more --minutes"
        result = result if compared.is_intact else "LOST OR CHANGED"
        yield f"{result}: {counted(self.faults.total(), 'fault')}, seed {self.seed}"
        yield str(compared)
        pauses = self.pauses.by_kind()
        for kind in FaultKind:
            if count := self.faults[kind]:
                yield f"{kind.value}: {count}{pause_text(pauses.get(kind, ()))}"
        for error, count in self.errors.most_common(3):
            yield f"{counted(count, 'answer')} ended with: {error}"


def pause_text(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    return f"; pause: median {median(seconds):.2f} s, p99 {p99(seconds):.2f} s, longest {max(seconds):.2f} s"


def p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]
