"""Budgets of reasoning: the same tokens and logprob bits for any cut, company and loss; and what clients get."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.client.local import LocalClient, LocalSettings
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampling import Grammar, Reasoning, SamplingParams
from llamaclust.model.grammars import definitions
from support.clusters.recovering import CONTEXT, Answer, answer_of, config, model_in, recovering, undisturbed
from support.models.random_schemas import random_schema
from support.seed import SEED

END = 2
ANSWERS = 16
_SEEDED = SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.1)
_OPENS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:<think>{% endif %}"
"""A template that begins reasoning."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


def _bytes(text: str) -> tuple[int, ...]:
    return tuple(3 + byte for byte in text.encode())


def _reasoning(number: int, grammar: Grammar | None) -> Reasoning:
    """Budgets that end in the middle of answers, and one that is not used up; reasoning that the prompt has begun and
    that the answer begins again and again; ends of a few tokens and of more than come together."""
    if number % 4 == 3:
        return Reasoning(("e", "t"), ("a",), _bytes("...a"), number, repeats=True)
    end = "</think>" if number % 8 != 4 else "x" * 80 + "</think>"
    budget = 400 if number % 8 == 5 else 3 * number
    return Reasoning(("<think>",), ("</think>",), _bytes(end), budget, is_open=True, delays_grammar=grammar is not None)


def requests(seed: int, tokens: int = 90) -> tuple[GenerationRequest, ...]:
    """Greedy and seeded ones, with logprobs and with forced tokens, with a common beginning; some have a grammar behind
    the reasoning, some one that a trigger starts."""
    source = Random(seed)
    lazy = definitions.lazy(definitions.of_lark('start: /[a-e]/ "forced text " /[a-z]{30}/', "tools"), list("abcde"))
    schemas = [definitions.of_schema(random_schema(source), "json_schema") for _ in range(2)]
    grammars: list[Grammar | None] = [None, schemas[0], lazy, None, None, schemas[1], None, None]
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
            grammar=grammars[i % 8],
            reasoning=_reasoning(i, grammars[i % 8]),
            with_logprobs=i % 3 == 0,
        )
        for i in range(ANSWERS)
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
        assert await run.start(requests(SEED)[6:7])[0] == expected[6], "with its prompt in the prefix cache"


@pytest.mark.parametrize("victim", ["a", "c"])
async def test_a_loss_in_the_middle_of_reasoning_changes_nothing(
    model: Path, expected: list[Answer], victim: str, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        answering = run.start(requests(SEED))
        await run.token(20 * ANSWERS)
        run.hurt(victim)
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"


async def test_preemption_in_the_middle_of_reasoning_changes_nothing(model: Path, expected: list[Answer]) -> None:
    client = LocalClient(model, threads=1, settings=LocalSettings(context_length=CONTEXT))
    async with client._stage.serve() as service:
        queues, counted = service._engine.scheduler.queues, count(1)

        def preempt() -> None:
            if next(counted) % 5 == 0 and queues.running:
                queues.preempt(queues.running[-1])

        answering = [answer_of(service._engine.submit(request), preempt) for request in requests(SEED)]
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
        assert service._engine.counts.preemptions > 5


async def test_tokens_are_the_same_whether_forced_ones_are_computed(model: Path, expected: list[Answer]) -> None:
    others = [replace(request, with_logprobs=not request.with_logprobs) for request in requests(SEED)]
    found = await asyncio.to_thread(undisturbed, model, others)
    assert [[token for token, _ in answer] for answer in found] == [
        [token for token, _ in answer] for answer in expected
    ]
    assert sum(logprob == bytes(4) for answer in expected for _, logprob in answer) > 100, "many tokens were forced"


def test_the_forced_end_stands_behind_the_budget(expected: list[Answer]) -> None:
    for request, answer in zip(requests(SEED), expected, strict=True):
        reasoning, tokens = request.reasoning, tuple(token for token, _ in answer)
        assert reasoning is not None and reasoning.budget is not None
        if reasoning.is_open and reasoning.budget < len(tokens) - 10:
            places = [i for i in range(len(tokens)) if tokens[i : i + 5] == reasoning.forced[:5]]
            assert places and reasoning.budget <= places[0] <= reasoning.budget + 7, request.request_id


@pytest.mark.parametrize("budget", [0, 7])
def test_clients_get_reasoning_of_the_budget_and_then_content(model: Path, budget: int, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(_OPENS)
    settings = LocalSettings(context_length=CONTEXT, chat_template=str(tmp_path / "template.jinja"))
    hello = [{"role": "user", "content": "Hello"}]
    with LocalClient(model, threads=1, settings=settings) as client:
        whole = client.chat(hello, max_tokens=60, reasoning_budget=budget, reasoning_budget_message=" Enough.")
        chunks = [*client.chat(hello, max_tokens=60, reasoning_budget=budget, stream=True)]
        free = client.chat(hello, max_tokens=60)
    if budget:
        assert whole.reasoning.endswith(" Enough.") and whole.text
    kinds = ["reasoning" if chunk.reasoning else "text" for chunk in chunks if chunk.reasoning or chunk.text]
    assert kinds == sorted(kinds) and kinds[-1] == "text" and ("reasoning" in kinds) == (budget > 0)
    assert free.reasoning and not free.text, "without a budget, it reasons to the end"
