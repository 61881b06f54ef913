"""Requests whose answers are constrained by grammars, reasoning budgets, or both."""

from __future__ import annotations

from random import Random
from typing import Any

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampler.matchers import Grammar, Reasoning
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.model.grammars import definitions
from support.chat.random_schemas import random_schema

_END = 2
_TOKENS = 90
_ANSWERS_WITH_REASONING = 16
_SEEDED = SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.1)


def grammar_requests(seed: int) -> tuple[GenerationRequest, ...]:
    """Builds requests: one without a grammar, one whose grammar a trigger starts, two choices of one request."""
    source = Random(seed)
    grammars: list[Grammar | None] = [_schema(source) for _ in range(6)]
    grammars[3] = grammars[2]
    prompts = _prompts(source, len(grammars) + 2)
    return tuple(
        _request(i, prompt, grammar=grammar, with_logprobs=i % 2 == 0)
        for i, (prompt, grammar) in enumerate(zip(prompts, [*grammars, _lazy(), None], strict=True))
    )


def reasoning_requests(seed: int) -> tuple[GenerationRequest, ...]:
    """Builds requests with reasoning; some have a grammar after it, some one that a trigger starts."""
    source = Random(seed)
    schemas = [_schema(source) for _ in range(2)]
    grammars: list[Grammar | None] = [None, schemas[0], _lazy(), None, None, schemas[1], None, None]
    prompts = _prompts(source, _ANSWERS_WITH_REASONING)
    return tuple(
        _request(
            i,
            prompt,
            grammar=(grammar := grammars[i % len(grammars)]),
            reasoning=_reasoning(i, grammar),
            with_logprobs=i % 3 == 0,
        )
        for i, prompt in enumerate(prompts)
    )


def _request(number: int, prompt: tuple[int, ...], **fields: Any) -> GenerationRequest:
    """Builds a greedy or seeded request."""
    params = _SEEDED if number % 4 > 1 else SamplingParams()
    own: dict[str, Any] = {"seed": number // 4, "choice": number % 2, "stop_token_ids": frozenset({_END})}
    return GenerationRequest(f"request {number}", prompt, _TOKENS, params, **own, **fields)


def _prompts(source: Random, count: int) -> list[tuple[int, ...]]:
    """Builds prompts with a common prefix."""
    shared = [source.randrange(3, 320) for _ in range(40)]
    return [(*shared, *(source.randrange(3, 320) for _ in range(5 * (i // 2)))) for i in range(count)]


def _schema(source: Random) -> Grammar:
    return definitions.of_schema(random_schema(source), "json_schema")


def _lazy() -> Grammar:
    """Returns a grammar that one of five letters starts."""
    lark = definitions.of_lark('start: /[a-e]/ "forced text " /[a-z]{30}/', "tools")
    return definitions.lazy(lark, list("abcde"))


def _reasoning(number: int, grammar: Grammar | None) -> Reasoning:
    """Returns budgets below and above the length of an answer, open or repeated reasoning, and end texts shorter and
    longer than one group of forced tokens."""
    if number % 4 == 3:
        return Reasoning(("e", "t"), ("a",), _bytes("...a"), number, repeats=True)
    end = "</think>" if number % 8 != 4 else "x" * 80 + "</think>"
    budget = 400 if number % 8 == 5 else 3 * number
    return Reasoning(("<think>",), ("</think>",), _bytes(end), budget, is_open=True, delays_grammar=grammar is not None)


def _bytes(text: str) -> tuple[int, ...]:
    return tuple(3 + byte for byte in text.encode())
