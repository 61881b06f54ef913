"""Tests of answer logs: order, contents, and waits for entries."""

from __future__ import annotations

import asyncio
from itertools import permutations
from random import Random

import pytest

from llamaclust.cluster.front.text import answer_log
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogContent, LogReader
from llamaclust.cluster.front.text.sharing import RowStorage
from llamaclust.cluster.scheduler.requests import FinishReason, GenerationRequest, Timings
from llamaclust.core.errors import DeadlineError, LlamaclustError
from llamaclust.core.sampler.results import RowResult
from support.seed import SEED

TIMINGS = Timings(1.0, 2.0, 3.0, 4.0, 5, 0, 1)
ROW = RowResult(7, -0.5)


def log_of(prompts: int, storage: RowStorage = RowStorage.CHUNKS) -> AnswerLog:
    log = AnswerLog()
    log.begin([GenerationRequest(f"{number}", (1,), 9) for number in range(prompts)], LogContent(storage))
    return log


def chunk(text: str, *, is_last: bool = False) -> TextChunk:
    end = FinishReason.STOP if is_last else None
    return TextChunk(text=text, rows=(ROW,), offsets=(0,), finish_reason=end, timings=TIMINGS if is_last else None)


def texts(reader: LogReader) -> list[str]:
    found = []
    while (entry := reader.take()) is not None:
        assert isinstance(entry[1], TextChunk)
        found.append(f"{entry[0]}{entry[1].text}")
    return found


@pytest.mark.parametrize("storage", [RowStorage.CHUNKS, RowStorage.STREAMED])
async def test_entries_come_prompt_by_prompt_however_they_are_computed(storage: RowStorage) -> None:
    source = Random(SEED)
    for _ in range(20):
        log, left = log_of(3, storage), {number: ["a", "b", "c", "end"] for number in range(3)}
        with LogReader(log) as reader:
            found = []
            while left:
                prompt = source.choice([*left])
                text = left[prompt].pop(0)
                if text == "end":
                    log.end(prompt)
                    del left[prompt]
                else:
                    log.append(prompt, chunk(text))
                found += texts(reader)
            assert found == [f"{prompt}{text}" for prompt in range(3) for text in "abc"] and reader.is_at_end


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
async def test_an_error_stands_behind_what_came_before_it(failing: int, order: tuple[int, ...]) -> None:
    log = log_of(3)
    for prompt in order:
        log.append(prompt, chunk("a"))
        log.end(prompt, LlamaclustError("lost") if prompt == failing else None)
    with LogReader(log) as reader:
        assert texts(reader) == [f"{prompt}a" for prompt in range(failing + 1)] and reader.is_at_end
    with pytest.raises(LlamaclustError, match="lost"):
        log.parts()


async def test_a_log_of_chunks_is_read_again_by_each_reader_from_its_beginning() -> None:
    log = log_of(1)
    for text in "ab":
        log.append(0, chunk(text))
    with LogReader(log) as first:
        assert texts(first) == ["0a", "0b"]
        log.append(0, chunk("c"))
        with LogReader(log) as second:
            assert texts(second) == ["0a", "0b", "0c"] and texts(first) == ["0c"]
        assert not first.is_at_end
        log.end(0)
        assert first.is_at_end
    log.clear()
    with LogReader(log) as late:
        assert late.is_at_end and late.take() is None


async def test_a_log_of_streamed_rows_lets_go_of_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_log, "MAX_UNREAD_ROWS", 5)
    log = log_of(2, RowStorage.STREAMED)
    for _ in range(9):  # appended before the reader begins
        log.append(0, chunk("a"))
        log.append(1, chunk("b"))
    with LogReader(log) as reader:
        assert reader.take() is not None
        for _ in range(6):
            log.append(0, chunk("a"))
        with pytest.raises(DeadlineError, match="15 tokens were waiting to be read"):
            log.append(0, chunk("a"))
        log.append(1, chunk("b"))
        texts(reader)
        log.end(0)
        assert texts(reader) == ["1b"] * 10  # chunks of the second prompt follow the first prompt's end


async def test_packed_answers_are_there_in_the_end() -> None:
    log = log_of(2, RowStorage.PACKED)
    for prompt, text in ((1, "c"), (0, "a")):
        log.append(prompt, chunk(text))
        log.append(prompt, chunk(text.upper(), is_last=True))
        log.end(prompt)
    assert [[answer.text for answer in answers] for answers in log.parts()] == [["aA"], ["cC"]]
    assert [answer.token_ids for (answer,) in log.parts()] == [(7, 7)] * 2


@pytest.mark.parametrize("storage", RowStorage)
async def test_subscribers_get_each_chunk_as_it_is_appended(storage: RowStorage) -> None:
    """Checks that subscribers of one attempt get no chunk of the next one."""
    owner: list[tuple[int, str]] = []
    log = AnswerLog(lambda prompt, item: owner.append((prompt, item.text)))
    attempts: list[list[int]] = [[], [], []]
    for attempt in attempts:
        log.begin([GenerationRequest("a", (1,), 9)] * 2, LogContent(storage))
        log.subscribe(lambda prompt, _, attempt=attempt: attempt.append(prompt))  # type: ignore[misc]
        for prompt in (1, 0):
            log.append(prompt, chunk("a", is_last=True))
    for prompt in (1, 0):
        log.end(prompt)
    assert owner == [(1, "a"), (0, "a")] * 3 and attempts == [[1, 0]] * 3
    assert [len(part) for part in log.parts()] == [1, 1]


async def test_readers_of_a_held_log_wait_for_its_release_or_its_failure() -> None:
    for is_failed in (False, True):
        log = AnswerLog(is_held=True)
        log.begin([GenerationRequest("a", (1,), 9)], LogContent(RowStorage.CHUNKS))
        log.append(0, chunk("a"))
        log.end(0)
        with LogReader(log) as reader:
            assert reader.take() is None and not reader.is_at_end
            waiting = asyncio.create_task(reader.wait(20.0))
            await asyncio.sleep(0)
            if is_failed:
                log.fail(LlamaclustError("too late to matter"))
            else:
                log.release()
            assert await waiting and texts(reader) == ["0a"] and reader.is_at_end
            log.raise_error()


async def test_each_wait_that_is_too_long_is_told() -> None:
    log = log_of(1)
    with LogReader(log) as reader:
        async with asyncio.timeout(60):
            assert [await reader.wait(0.01) for _ in range(2)] == [False, False]
            waiting = asyncio.create_task(reader.wait(60.0))
            await asyncio.sleep(0)
            log.append(0, chunk("a"))
            assert await waiting


async def test_short_waits_set_one_timer() -> None:
    loop = asyncio.get_running_loop()
    set_at: list[float] = []
    plain = loop.call_at

    def counted(when: float, *rest: object, **more: object) -> asyncio.TimerHandle:
        set_at.append(when)
        return plain(when, *rest, **more)  # type: ignore[arg-type]

    loop.call_at = counted  # type: ignore[method-assign]
    log = log_of(1)
    with LogReader(log) as reader:
        for _ in range(100):
            waiting = asyncio.create_task(reader.wait(60.0))
            await asyncio.sleep(0)
            log.append(0, chunk("a"))
            assert await waiting and reader.take()
    assert len(set_at) == 1


async def test_a_cancelled_wait_loses_nothing() -> None:
    log = log_of(1)
    with LogReader(log) as reader:
        waiting = asyncio.create_task(reader.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        log.append(0, chunk("a"))
        assert texts(reader) == ["0a"]


async def test_the_first_chunk_is_awaited_for_a_moment() -> None:
    log = log_of(1)
    await log.first(0.01)
    log.append(0, chunk("a"))
    log.end(0, LlamaclustError("later"))
    await log.first(60.0)
    failed = log_of(1)
    failed.end(0, LlamaclustError("at once"))
    with pytest.raises(LlamaclustError, match="at once"):
        await failed.first(60.0)
