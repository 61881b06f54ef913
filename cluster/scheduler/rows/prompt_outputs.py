"""Tracks the rows of a prompt that have an output. An output is a logprob or a hidden state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PromptOutputs:
    answered: int
    end: int
    next: int

    def take(self, end: int) -> None:
        self.next = max(self.next, min(end, self.end))

    def repeat(self) -> None:
        self.next = self.answered
