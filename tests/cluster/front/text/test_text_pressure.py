"""Tests of the text of completions under load: full queues, slow readers, drains."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from threading import Event
from unittest.mock import Mock

import pytest

from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.front.text import answer_log, completion, sharing
from llamaclust.cluster.front.text.answer import Answer
from llamaclust.cluster.front.text.completion import ChoiceText
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.sharing import BREAKERS, Threads, run_on, tokenizing
from llamaclust.core.errors import DeadlineError, QueueFullError
from support.clusters.served import ScriptedEngine, collect, make_service, real_engine, says, until

GENERATION = CompletionRequest("Hello", seed=7)


async def answers(engine: ScriptedEngine, generation: CompletionRequest) -> list[Answer]:
    async with await make_service(engine).start(generation) as stream:
        return await collect(stream.log.chunks())


async def test_later_choices_wait_where_the_queue_is_full() -> None:
    engine = ScriptedEngine(says("a b"))
    begin = engine.begin
    refusals = [QueueFullError("full", 0.01), QueueFullError("full", 0.01)]

    def picky(generation, sink):  # type: ignore[no-untyped-def]
        if generation.choice and refusals:
            raise refusals.pop()
        return begin(generation, sink)

    engine.begin = picky  # type: ignore[method-assign]
    assert len(await answers(engine, replace(GENERATION, n=2))) == 2
    assert not refusals


async def test_later_choices_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "_QUEUE_S", 0.05)
    engine = ScriptedEngine(says("a b"))
    begin = engine.begin

    def picky(generation, sink):  # type: ignore[no-untyped-def]
        if generation.choice:
            raise QueueFullError("full", 0.01)
        return begin(generation, sink)

    engine.begin = picky  # type: ignore[method-assign]
    with pytest.raises(QueueFullError):
        await answers(engine, replace(GENERATION, n=2))
    assert engine.running == 0


@pytest.mark.parametrize(("turn_tokens", "turns"), [(1, 4), (1 << 16, 1)])
async def test_later_choices_of_long_prompts_take_turns_with_other_work(
    turn_tokens: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "_TURN_TOKENS", turn_tokens)
    engine = ScriptedEngine(says("a b"))
    begin, turn, begun = engine.begin, [0], list[tuple[int, int]]()

    def noted(generation, sink):  # type: ignore[no-untyped-def]
        begun.append((generation.choice, turn[0]))
        return begin(generation, sink)

    async def count_turns() -> None:
        while True:
            await asyncio.sleep(0)
            turn[0] += 1

    engine.begin = noted  # type: ignore[method-assign]
    counting = asyncio.create_task(count_turns())
    assert len(await answers(engine, replace(GENERATION, n=5))) == 5
    counting.cancel()
    (_, *later) = begun
    assert [choice for choice, _ in later] == [1, 2, 3, 4]
    assert len({turn for _, turn in later}) == turns


async def test_a_full_queue_is_tried_for_one_choice_at_a_time() -> None:
    engine = ScriptedEngine(says("a b"))
    begin, tried = engine.begin, list[int]()

    def picky(generation, sink):  # type: ignore[no-untyped-def]
        tried.append(generation.choice)
        if generation.choice and tried.count(generation.choice) <= 3:
            raise QueueFullError("full", 0.001)
        return begin(generation, sink)

    engine.begin = picky  # type: ignore[method-assign]
    assert len(await answers(engine, replace(GENERATION, n=3))) == 3
    assert tried == [0, 1, 1, 1, 1, 2, 2, 2, 2]


async def test_a_reader_that_falls_behind_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_log, "MAX_UNREAD_ROWS", 20)
    engine = ScriptedEngine(says("a" * 100))
    async with await make_service(engine).start(replace(GENERATION, n=3)) as stream:
        chunks = stream.log.chunks()
        await anext(chunks)
        await until(lambda: engine.running == 0)
        with pytest.raises(DeadlineError, match="read too slowly: 21 tokens"):
            await collect(chunks)


async def test_a_bug_in_one_text_ends_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks isolation, since text is decoded within the engine's own work."""
    taken = ChoiceText.take
    asked = GENERATION, replace(GENERATION, prompt="Hello you")
    async with real_engine() as (engine, _):
        service = make_service(engine)
        first, second = [await service.start(replace(request, max_new_tokens=9, ignore_eos=True)) for request in asked]
        faulty, running = first._choices[0]._text, first._choices[0].request
        assert running is not None
        aborting = Mock(wraps=running.abort)
        monkeypatch.setattr(running, "abort", aborting)
        monkeypatch.setattr(ChoiceText, "take", lambda text, event: 1 / 0 if text is faulty else taken(text, event))
        async with first, second:
            with pytest.raises(ZeroDivisionError):
                await collect(first.log.chunks())
            await until(lambda: aborting.called)  # The engine computes no more of a text that nobody can get.
            (answer,) = await collect(second.log.chunks())
    assert len(answer.rows) == 9


async def test_a_drained_service_has_answered_every_choice() -> None:
    async with real_engine() as (engine, pipeline):
        service = make_service(engine)
        pipeline.gate.clear()
        stream = await service.start(replace(GENERATION, n=4, max_new_tokens=5))

        async def read() -> list[Answer]:
            async with stream:
                return await collect(stream.log.chunks())

        reading = asyncio.create_task(read())
        draining = asyncio.create_task(engine.drain(10))
        await until(lambda: engine.state is EngineState.DRAINING)
        pipeline.gate.set()
        await draining
        assert len(await reading) == 4
        assert service.active_requests == 0


async def test_an_unread_answer_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that an answer is kept until its reader comes, since prompts of a request are read in order."""
    monkeypatch.setattr(answer_log, "MAX_UNREAD_ROWS", 20)
    engine = ScriptedEngine(says("a" * 100))
    async with await make_service(engine).start(GENERATION) as stream:
        await until(lambda: engine.running == 0)
        (answer,) = await collect(stream.log.chunks())
    assert answer.text == "a" * 100


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_work_on_breakers_holds_up_no_other_work_on_texts() -> None:
    is_over, begun = Event(), Event()

    def hold() -> None:
        begun.set()
        is_over.wait(60.0)

    held = BREAKERS.executor.submit(hold)
    service = make_service(ScriptedEngine(says("a")))
    try:
        assert begun.wait(60)
        async with asyncio.timeout(60):
            assert await service.tokenize("a" * 5000)
        assert not held.done()
    finally:
        is_over.set()


async def test_work_on_texts_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that work which is still waiting for its thread at the deadline does not run."""
    monkeypatch.setattr(sharing, "_WORK_S", 0.05)
    held, ran = Event(), list[int]()
    pool = Threads(1, "held")
    for work in (partial(held.wait, 20.0), partial(ran.append, 1)):
        with pytest.raises(DeadlineError, match=r"on a busy machine took longer than 0.05 s"):
            await run_on(pool, work)
    held.set()
    pool.executor.shutdown()
    assert ran == []


@pytest.mark.parametrize("characters", [1 << 17, 1 << 20])
async def test_long_texts_are_tokenized_one_at_a_time_and_short_ones_beside_them(characters: int) -> None:
    """Checks the limit of one long text at a time, since each needs much memory."""
    at_work: list[int] = []
    most, gate = [0], Event()

    def work(size: int) -> None:
        at_work.append(size)
        most[0] = max(most[0], at_work.count(characters))
        if size == characters:
            gate.wait(5)
        at_work.remove(size)

    long = [asyncio.create_task(run_on(tokenizing(characters), work, characters)) for _ in range(3)]
    await until(lambda: characters in at_work)
    for size in (1, 5000, 30_000):
        await run_on(tokenizing(size), work, size)
    gate.set()
    await asyncio.gather(*long)
    assert most == [1]
