"""Tests of the deadline of drafts: a model that does not answer is disabled, one in a paused process is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from llamaclust.cluster.engine import draft_runner
from llamaclust.cluster.engine.draft_runner import DraftRunner
from llamaclust.core.drafts import DraftReplies


class Drafts:
    """A fake of `ModelDrafts` and of the model."""

    def __init__(self, draft: Callable[[], Awaitable[DraftReplies]]) -> None:
        self.model = self
        self.is_lost = False
        self.replies: list[DraftReplies] = []
        self._draft = draft

    def draft(self, orders: list[str]) -> Awaitable[DraftReplies]:
        return self._draft()

    def next_orders(self, running: object) -> list[str]:
        return [] if self.replies else ["one"]

    def drafted(self, replies: DraftReplies, taken_ns: int, sequences: object) -> None:
        self.replies.append(replies)

    def lose(self) -> None:
        self.is_lost = True


class Scheduler:
    """The parts of a scheduler that drafts need."""

    def __init__(self, drafts: Drafts) -> None:
        self.speculation = self.queues = self
        self.model_drafts = drafts
        self.running: list[object] = []
        self.by_key: dict[int, object] = {}


async def run(draft: Callable[[], Awaitable[DraftReplies]]) -> Drafts:
    """Requests a draft once; returns when a reply is there or none will come."""
    drafts, ended = Drafts(draft), asyncio.Event()
    DraftRunner(cast(Any, Scheduler(drafts)), ended.set).request()
    await asyncio.wait_for(ended.wait(), 60)
    return drafts


async def test_a_model_that_does_not_answer_is_not_asked_any_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(draft_runner, "_SLICE_S", 0.001)
    monkeypatch.setattr(draft_runner, "_DEADLINE_S", 0.02)
    answer = asyncio.get_running_loop().create_future()
    drafts = await run(lambda: answer)
    assert drafts.is_lost and not drafts.replies and answer.cancelled()
    assert "the draft model failed and is disabled: the draft model did not answer within 0.02 s" in caplog.text


async def test_a_pause_of_the_process_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process pauses for longer than the deadline, as by SIGSTOP, and the model answers afterwards."""
    monkeypatch.setattr(draft_runner, "_SLICE_S", 0.2)
    monkeypatch.setattr(draft_runner, "_DEADLINE_S", 0.4)
    loop, replies = asyncio.get_running_loop(), DraftReplies(())
    answer = loop.create_future()

    def pause() -> None:
        time.sleep(0.5)
        loop.call_soon(loop.call_soon, answer.set_result, replies)  # timers that are due run first

    def draft() -> Awaitable[DraftReplies]:
        loop.call_soon(loop.call_soon, pause)  # runs once the answer is awaited
        return answer

    drafts = await run(draft)
    assert drafts.replies == [replies] and not drafts.is_lost
