"""Tests of answers with grammars and reasoning budgets: tokens and logprob bits are the same for any split, batch and
lost worker. Also tests the clients' view of reasoning."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from time import sleep

import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.scheduler.matcher_turns import MatcherTurns
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.sampler.matchers import AllowedTokens
from llamaclust.core.sampler.tasks import MatcherRow
from llamaclust.model.grammars.matcher import GrammarMatcher, LexerUsedUpError
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.worker.stage import matched_answer
from llamaclust.worker.stage.matched_answer import MatchedAnswer
from support.chat.constrained_requests import grammar_requests, reasoning_requests
from support.chat.large_vocabulary import build_large_vocabulary_model
from support.clusters.recovering import CONTEXT, Answer, answer_of, config, model_in, recovering, undisturbed
from support.models.tiny_architectures import build_architecture
from support.seed import SEED

_OPENS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:<think>{% endif %}"
"""A chat template that opens reasoning."""
Undisturbed = Callable[[str], list[Answer]]


@dataclass(frozen=True, slots=True)
class Case:
    """Requests of a test. Request `repeated` is sent again, a worker is lost after `lost_after` tokens of all answers,
    and more than `forced` tokens have no logprob because they are forced."""

    requests: tuple[GenerationRequest, ...]
    repeated: int
    lost_after: int
    forced: int


_CASES = {
    "grammars": Case(grammar_requests(SEED), repeated=0, lost_after=60, forced=5),
    "reasoning": Case(reasoning_requests(SEED), repeated=6, lost_after=320, forced=50),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=_CASES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def case(name: str) -> Case:
    return _CASES[name]


@pytest.fixture(scope="module")
def answers(model: Path) -> Undisturbed:
    """Returns a function that computes one worker's answers to the requests of a case, once per case."""
    return cache(lambda name: undisturbed(model, _CASES[name].requests))


@pytest.fixture(scope="module")
def expected(answers: Undisturbed, name: str) -> list[Answer]:
    return answers(name)


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_any_cut_gives_the_same_answers(
    model: Path, case: Case, expected: list[Answer], workers: int, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path, workers)) as run:
        assert await asyncio.gather(*run.start(case.requests)) == expected, f"seed {SEED}"
        (again,) = run.start([case.requests[case.repeated]])
        assert await again == expected[case.repeated], "with its prompt in the prefix cache"


async def test_a_large_vocabulary_that_is_prepared_before_changes_nothing(tmp_path: Path) -> None:
    model = build_large_vocabulary_model(tmp_path / "large.gguf")
    requests = grammar_requests(SEED)[:4]
    expected = await asyncio.to_thread(undisturbed, model, requests)
    # At first, the large vocabulary blocks the interpreter.
    settings = config(model, tmp_path, 1, timeouts={"worker": "10s"})
    async with recovering(settings) as run:
        run.cluster.engine.prepare_matchers()
        assert await asyncio.gather(*run.start(requests)) == expected, f"seed {SEED}"


@pytest.mark.parametrize("victim", ["a", "c"])
async def test_a_loss_in_the_middle_of_answers_changes_nothing(
    model: Path, case: Case, expected: list[Answer], victim: str, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        answering = run.start(case.requests)
        await run.token(case.lost_after)
        run.hurt(victim)
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"


async def test_preemption_in_the_middle_of_answers_changes_nothing(
    model: Path, case: Case, expected: list[Answer]
) -> None:
    client = LocalClient(model, threads=1, settings=LocalSettings(context_length=CONTEXT))
    async with client._stage.serve() as service:
        queues, counted = service._engine.scheduler.queues, count(1)

        def preempt() -> None:
            if next(counted) % 5 == 0 and queues.running:
                queues.preempt(queues.running[-1])

        answering = [answer_of(service._engine.submit(request), preempt) for request in case.requests]
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
        assert service._engine.counts.preemptions > 5


@pytest.mark.parametrize("has_states", [False, True])
async def test_deferred_rows_and_matchers_that_are_made_again_change_nothing(
    model: Path, answers: Undisturbed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_states: bool
) -> None:
    """A fifth of the rows have no matcher yet, matchers are late, and a hundredth of the tokens exhaust the lexer. Rows
    that have updated a state are not computed again in place."""
    requests = _CASES["grammars"].requests
    if has_states:
        model = build_architecture(tmp_path / "lfm2.gguf", "lfm2")
        expected = await asyncio.to_thread(undisturbed, model, requests)
    else:
        expected = await asyncio.to_thread(answers, "grammars")
    source, begin, try_take, deferred = Random(SEED), MatchedAnswer.begin, GrammarMatcher.try_take, count(1)
    make = MatchedAnswer.make_matcher

    def begin_late(answer: MatchedAnswer, row: MatcherRow) -> bool:
        # The matcher of a drafted row has just taken the row before it, so it is ready.
        if row.drafted is None and source.random() < 1 / 5:
            next(deferred)
            answer._due = row.position if answer._due is None else answer._due
            return False
        return begin(answer, row)

    def use_up(matcher: GrammarMatcher, token: int) -> AllowedTokens | None:
        if not matcher._is_costly and source.random() < 1 / 100:
            raise LexerUsedUpError("used up")
        return try_take(matcher, token)

    def make_late(answer: MatchedAnswer, read_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        sleep(source.random() / 10)
        make(answer, read_vocabulary)

    monkeypatch.setattr(MatchedAnswer, "begin", begin_late)
    monkeypatch.setattr(MatchedAnswer, "make_matcher", make_late)
    monkeypatch.setattr(GrammarMatcher, "try_take", use_up)
    client = LocalClient(model, threads=1, settings=LocalSettings(context_length=CONTEXT))
    async with client._stage.serve() as service:
        answering = [answer_of(service._engine.submit(request)) for request in requests]
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
    assert next(deferred) > 10  # 60 to 180 rows, depending on drafts.


@pytest.mark.parametrize("architecture", ["qwen3", "lfm2", "gemma2"])
async def test_matchers_that_are_slow_by_turns_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str
) -> None:
    """The last stage's clock is simulated. Only some of the slow answers have a row in each microbatch."""
    requests = [replace(request, owner=str(n % 3)) for n, request in enumerate(_CASES["grammars"].requests)]
    model = build_architecture(tmp_path / "model.gguf", architecture)
    expected = await asyncio.to_thread(undisturbed, model, requests)
    source, ticks, held, find_held = Random(SEED), [0], list[int](), MatcherTurns.held

    def slow_time() -> int:
        ticks[0] += source.choice((0, 0, 5, 20, 60, 120)) * 1_000_000
        return ticks[0]

    def noting(turns: MatcherTurns, running: list[Sequence]) -> frozenset[Sequence]:
        found = find_held(turns, running)
        held.append(len(found))
        return found

    monkeypatch.setattr(matched_answer, "thread_time_ns", slow_time)
    monkeypatch.setattr(MatcherTurns, "held", noting)
    client = LocalClient(model, threads=1, settings=LocalSettings(context_length=CONTEXT))
    async with client._stage.serve() as service:
        answering = [answer_of(service._engine.submit(request)) for request in requests]
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
    assert sum(held) > 100


async def test_tokens_are_the_same_whether_forced_ones_are_computed(
    model: Path, case: Case, expected: list[Answer]
) -> None:
    others = [replace(request, with_logprobs=not request.with_logprobs) for request in case.requests]
    found = await asyncio.to_thread(undisturbed, model, others)
    assert [[token for token, _ in answer] for answer in found] == [
        [token for token, _ in answer] for answer in expected
    ]
    assert sum(logprob == bytes(4) for answer in expected for _, logprob in answer) > case.forced


def test_the_forced_end_stands_behind_the_budget(answers: Undisturbed) -> None:
    for request, answer in zip(_CASES["reasoning"].requests, answers("reasoning"), strict=True):
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
