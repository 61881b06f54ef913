from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.speculation.retry import Retry


@dataclass(slots=True)
class MtpUse:
    ordered: int = 0  # Number of tokens to draft after the next step.
    is_awaited: bool = False  # True while a step that drafts tokens is in flight.
    _retry: Retry = field(default_factory=Retry)

    def is_due(self, tokens: int) -> bool:
        return self._retry.is_due(tokens)

    def order(self, tokens: int, count: int) -> None:
        self._retry.ordered(tokens)
        self.ordered = count

    def take(self) -> int:
        ordered, self.ordered = self.ordered, 0
        self.is_awaited = self.is_awaited or ordered > 0
        return ordered
