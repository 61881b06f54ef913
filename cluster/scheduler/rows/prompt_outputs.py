"""The rows of one prompt that are scored, or whose hidden states are wanted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PromptOutputs:
    """Rows [answered, end) have no result yet; those before `next` are in flight."""

    answered: int
    end: int
    next: int

    def take(self, end: int) -> None:
        self.next = max(self.next, min(end, self.end))

    def repeat(self) -> None:
        self.next = self.answered
