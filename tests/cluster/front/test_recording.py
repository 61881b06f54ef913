"""Tests of records for a later computation: tokens, written in time, and use of a grammar."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

from llamaclust.cluster.front.replies import recording
from llamaclust.cluster.front.replies.recording import Recording
from llamaclust.cluster.front.replies.reply import identified
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext, read_journal
from llamaclust.core.errors import WorkerError
from llamaclust.core.sampler.matchers import Grammar, Reasoning
from llamaclust.core.sampler.results import RowResult
from support.clusters.resumable import PATHS, KilledJournal, body_of, served, stream
from support.seed import SEED

GRAMMAR = Grammar("{}", origin="tools")


class Written:
    """A replacement of a journal that keeps the tokens of each choice in order."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def answer(self, request_id: str, choice: tuple[int, int], start: int, rows: Sequence[RowResult]) -> None:
        tokens = self.tokens.setdefault(choice[1], [])
        assert start == len(tokens)
        tokens += [row.token for row in rows]


def test_of_slow_streams_at_most_a_second_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, now_s, written = Random(SEED), 0.0, Written()
    monkeypatch.setattr(recording, "monotonic", lambda: now_s)
    recorded = Recording(cast(Journal, written), context(None), asyncio.Event())
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


async def test_tokens_of_the_first_prompts_are_recorded_if_a_thread_makes_later_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, make, calls = asyncio.get_running_loop(), TextService._choices, list[str]()

    async def turns() -> None:
        for _ in range(5000):
            await asyncio.sleep(0)

    def slow(*given: Any) -> Any:
        calls.append(threading.current_thread().name)
        if len(calls) == 2:  # gives the engine time for the first prompt
            asyncio.run_coroutine_threadsafe(turns(), loop).result(60)
        return make(*given)

    monkeypatch.setattr(TextService, "_choices", slow)
    path, body = tmp_path / "journal", body_of(PATHS[0], prompt=["Hello", "you"], stop=["z" * 3000])
    async with served(path, KilledJournal) as server:
        await stream(server.http, "POST", PATHS[0], json=body)
    (left,) = read_journal(path, Instant.now())
    assert calls[1].startswith("tokenize") and [*left.answered] == [(0, 0), (1, 0)]
    assert max(map(len, left.answered.values())) >= 64


def context(has_grammar: bool | None) -> RequestContext:
    return RequestContext(id="a", seed=1, created=1, endpoint="/v1/chat/completions", has_grammar=has_grammar)


def test_the_first_decision_about_a_grammar_counts() -> None:
    free, bound = CompletionRequest("a"), CompletionRequest("a", grammar=GRAMMAR)
    first = context(None)
    assert [identified(request, first, 0).grammar for request in (free, bound)] == [None, None]
    assert first.has_grammar is False
    first = context(None)
    assert identified(bound, first, 0).grammar == GRAMMAR
    with pytest.raises(WorkerError, match="was not ready in time"):
        identified(free, first, 0)


def test_reasoning_without_a_budget_goes_with_the_grammar_that_it_delays() -> None:
    bound = CompletionRequest("a", grammar=GRAMMAR, reasoning=(delaying := Reasoning((), ("e",), delays_grammar=True)))
    free, kept = (identified(bound, context(has_grammar), 0) for has_grammar in (False, True))
    assert (free.grammar, free.reasoning) == (None, None) and (kept.grammar, kept.reasoning) == (GRAMMAR, delaying)
    left = identified(replace(bound, reasoning=replace(delaying, budget=3)), context(False), 0)
    assert left.reasoning == replace(delaying, budget=3, delays_grammar=False)
