"""Heads that are asked whether their drafts pay or not."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import pytest

from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.speculation.head_drafts import HeadDrafts


@dataclass
class AnyLengths:
    """In place of what pays: a head is asked for any number of tokens."""

    source: random.Random
    most: int
    asked: int = field(default=0, init=False)

    def length(self, sequences: Items[Sequence], speed: float, groups: int, most: int) -> int:
        count = min(most, self.source.randint(0, self.most))
        self.asked += count > 0
        return count


def ask_for_any(source: random.Random, most: int, monkeypatch: pytest.MonkeyPatch) -> AnyLengths:
    lengths = AnyLengths(source, most)
    monkeypatch.setattr(HeadDrafts, "length", lengths.length)
    return lengths
