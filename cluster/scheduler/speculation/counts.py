from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

Kinds = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class DraftCounts:
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    kinds: Kinds = field(default_factory=dict, compare=False)

    @classmethod
    def of_window(cls, kind: str, drafted: int, accepted: int) -> Self:
        return cls(1, drafted, accepted, {kind: (drafted, accepted)} if kind else {})

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return self._with(other, 1)

    def __sub__(self, other: DraftCounts) -> DraftCounts:
        return self._with(other, -1)

    def _with(self, other: DraftCounts, sign: int) -> DraftCounts:
        kinds = dict(self.kinds)
        for kind, (drafted, accepted) in other.kinds.items():
            before = kinds.get(kind, (0, 0))
            kinds[kind] = before[0] + sign * drafted, before[1] + sign * accepted
        return DraftCounts(
            self.drafts + sign * other.drafts,
            self.drafted + sign * other.drafted,
            self.accepted + sign * other.accepted,
            kinds,
        )
