"""Answers under grammars: the same tokens and logprob bits for any cut, company and loss."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from random import Random
from time import sleep

import pytest

from llamaclust.cluster.client.local import LocalClient, LocalSettings
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampling import AllowedTokens, Grammar, MatcherRow, SamplingParams
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher, LexerUsedUpError
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.worker.stage.matched_answer import MatchedAnswer
from support.clusters.recovering import CONTEXT, Answer, answer_of, config, model_in, recovering, undisturbed
from support.models.random_schemas import random_schema
from support.seed import SEED

END = 2
_SEEDED = SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


def requests(seed: int, tokens: int = 90) -> tuple[GenerationRequest, ...]:
    """Greedy and seeded ones, with logprobs and with forced tokens, with a common beginning; one is free, one becomes
    constrained by a trigger, two are choices of one request."""
    source = Random(seed)
    grammars: list[Grammar | None] = [definitions.of_schema(random_schema(source), "json_schema") for _ in range(6)]
    grammars[3] = grammars[2]
    lazy = definitions.of_lark('start: /[a-e]/ "forced text " /[a-z]{30}/', "tools")
    grammars += [definitions.lazy(lazy, list("abcde")), None]
    shared = [source.randrange(3, 320) for _ in range(40)]
    return tuple(
        GenerationRequest(
            f"request {i}",
            (*shared, *(source.randrange(3, 320) for _ in range(5 * (i // 2)))),
            tokens,
            _SEEDED if i % 4 > 1 else SamplingParams(),
            seed=i // 4,
            choice=i % 2,
            stop_token_ids=frozenset({END}),
            grammar=grammar,
            with_logprobs=i % 2 == 0,
        )
        for i, grammar in enumerate(grammars)
    )


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    return undisturbed(model, requests(SEED))


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_any_cut_gives_the_same_answers(
    model: Path, expected: list[Answer], workers: int, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path, workers)) as run:
        assert await asyncio.gather(*run.start(requests(SEED))) == expected, f"seed {SEED}"
        assert await run.start(requests(SEED)[:1])[0] == expected[0], "with its prompt in the prefix cache"


@pytest.mark.parametrize("victim", ["a", "c"])
async def test_a_loss_in_the_middle_of_an_answer_changes_nothing(
    model: Path, expected: list[Answer], victim: str, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        answering = run.start(requests(SEED))
        await run.token(60)
        run.hurt(victim)
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"


async def test_preemption_in_the_middle_of_an_answer_changes_nothing(model: Path, expected: list[Answer]) -> None:
    client = LocalClient(model, threads=1, settings=LocalSettings(context_length=CONTEXT))
    async with client._stage.serve() as service:
        queues, counted = service._engine.scheduler.queues, count(1)

        def preempt() -> None:
            if next(counted) % 5 == 0 and queues.running:
                queues.preempt(queues.running[-1])

        answering = [answer_of(service._engine.submit(request), preempt) for request in requests(SEED)]
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
        assert service._engine.counts.preemptions > 5


async def test_deferred_rows_and_matchers_that_are_made_again_change_nothing(
    model: Path, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of the rows find no matcher, matchers are late, and one of a hundred tokens uses up a lexer."""
    source, begin, try_take, deferred = Random(SEED), MatchedAnswer.begin, GrammarMatcher.try_take, count(1)
    make = MatchedAnswer.make_matcher

    def begin_late(answer: MatchedAnswer, row: MatcherRow) -> bool:
        if source.random() < 1 / 5:
            next(deferred)
            answer._due = row.position if answer._due is None else answer._due
            return False
        return begin(answer, row)

    def use_up(matcher: GrammarMatcher, token: int) -> AllowedTokens | None:
        if not matcher._is_costly and source.random() < 1 / 100:
            raise LexerUsedUpError("used up")
        return try_take(matcher, token)

    def make_late(answer: MatchedAnswer, vocabulary: GrammarVocabulary) -> None:
        sleep(source.random() / 10)
        make(answer, vocabulary)

    monkeypatch.setattr(MatchedAnswer, "begin", begin_late)
    monkeypatch.setattr(MatchedAnswer, "make_matcher", make_late)
    monkeypatch.setattr(GrammarMatcher, "try_take", use_up)
    client = LocalClient(model, threads=1, settings=LocalSettings(context_length=CONTEXT))
    async with client._stage.serve() as service:
        answering = [answer_of(service._engine.submit(request)) for request in requests(SEED)]
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
    assert next(deferred) > 50


async def test_tokens_are_the_same_with_and_without_forced_ones(model: Path, expected: list[Answer]) -> None:
    computed = [
        GenerationRequest(
            request.request_id,
            request.prompt,
            request.max_new_tokens,
            request.params,
            request.seed,
            request.choice,
            request.stop_token_ids,
            grammar=request.grammar,
            with_logprobs=True,
        )
        for request in requests(SEED)
    ]
    every = await asyncio.to_thread(undisturbed, model, computed)
    assert [[token for token, _ in answer] for answer in every] == [
        [token for token, _ in answer] for answer in expected
    ]
    assert sum(lp == bytes(4) for answer in expected for _, lp in answer) > 5, "some tokens were forced"
