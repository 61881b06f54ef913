"""When sampled tokens are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import cast

import pytest

from llamaclust.cluster.front.replies import ticket
from llamaclust.cluster.front.replies.ticket import Recording
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.state.journal import Journal
from llamaclust.core.sampling import RowResult
from support.seed import SEED


class Written:
    """In place of a journal: the tokens of each choice, in the order of their places."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def answer(self, request_id: str, choice: tuple[int, int], start: int, rows: Sequence[RowResult]) -> None:
        tokens = self.tokens.setdefault(choice[1], [])
        assert start == len(tokens)
        tokens += [row.token for row in rows]


def test_of_slow_streams_at_most_a_second_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, now_s, written = Random(SEED), 0.0, Written()
    monkeypatch.setattr(ticket, "monotonic", lambda: now_s)
    recorded = Recording(cast(Journal, written), "id", {}, None)
    sampled: dict[int, list[tuple[float, int]]] = {0: [], 1: []}
    for token in range(2000):
        now_s += source.expovariate(20)
        choice = source.randrange(2)
        sampled[choice].append((now_s, token))
        recorded.add(0, TextChunk(choice, rows=(RowResult(token, -1.0),)))
        for number, tokens in sampled.items():
            missing = tokens[len(written.tokens.get(number, ())) :]
            assert len(missing) < 64
            assert all(now_s - at_s < 1.0 for at_s, _ in missing)
    for number, tokens in sampled.items():
        assert written.tokens[number] == [token for _, token in tokens][: len(written.tokens[number])]
