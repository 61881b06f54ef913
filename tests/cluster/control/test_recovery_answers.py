"""Tests of workers that give wrong answers: they count as lost, and no token changes."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from llamaclust.cluster.planner import step_limits
from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.faults.worker_program import run_in_workers
from support.clusters.recovering import Answer, config, recovering

TOKENS = 100

_RESULT = """
# One wrong answer, the {at}th.
import os
from dataclasses import replace
from itertools import count

from llamaclust.wire.microbatch.results import decode_result
from llamaclust.worker.stage.loop import StageLoop
from support.wire.slow_codec import encode_result as encode

answers, right = count(), StageLoop._result

def wrong(loop, *given):
    answer = right(loop, *given)
    if next(answers) >= {at} and not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        message = decode_result(answer.data)
        return replace(answer, data={answer})
    return answer

StageLoop._result = wrong
"""
_HEARTBEAT = """
import os
from dataclasses import replace
from itertools import count

import llamaclust.worker.membership as membership

answers, encode = count(), membership.encode_worker_message

def wrong(message):
    if type(message).__name__ == "Heartbeat" and next(answers) >= {at} and not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        return {answer}
    return encode(message)

membership.encode_worker_message = wrong
"""

RESULT = (_RESULT, 20)
CONTROL = (_HEARTBEAT, 40)
ANSWERS = {
    "no message": (*RESULT, r"b'\xff\xff'", "damaged"),
    "of an older epoch": (*RESULT, "encode(replace(message, epoch=message.epoch - 1))", "of epoch 1.0"),
    "of an older microbatch": (
        *RESULT,
        "encode(replace(message, number=message.number - 1))",
        "of epoch 1.1, found",
    ),
    "of a later microbatch": (
        *RESULT,
        "encode(replace(message, number=message.number + 1))",
        "of epoch 1.1, found",
    ),
    "too short": (*RESULT, "encode(replace(message, rows=message.rows[1:]))", "results instead of"),
    "not finite": (
        *RESULT,
        "encode(replace(message, rows=tuple(replace(row, logprob=float('nan')) for row in message.rows)))",
        "logprob",
    ),
    "a sign of life that is none": (*CONTROL, "encode(replace(message, busy=float('nan')))", "busy is nan"),
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_wrong_answers_change_no_token(
    what: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, at, answer, says = ANSWERS[what]
    marker = tmp_path / "answered"
    run_in_workers(monkeypatch, tmp_path, program.format(at=at, answer=answer, marker=str(marker)), "c")

    async with recovering(config(model, tmp_path)) as cluster:
        answers = await asyncio.gather(*cluster.start(requests))
        await cluster.until("the wrong answer", marker.exists)
        await cluster.until("the loss", lambda: any("is lost" in text for text in cluster.told))
        (lost,) = (text for text in cluster.told if "is lost" in text)
        assert lost.startswith("worker c (layers [4, 6)) is lost: ") and says in lost
        assert answers == expected
        await cluster.whole()


_HANGING = """
# The compute thread hangs once, in a step.
import os, threading

import llamaclust.worker.stage.compute as compute
from llamaclust.worker.stage.loop import StageLoop

run_layers = StageLoop._run_layers
compute.INLINE_NS = 0  # every step in the thread

def hang(self, arrival):
    if arrival.frame.number >= 20 and not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        threading.Event().wait()
    return run_layers(self, arrival)

StageLoop._run_layers = hang
"""


async def test_a_compute_thread_that_hangs_is_noticed_by_the_predicted_time(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "hangs"
    run_in_workers(monkeypatch, tmp_path, _HANGING.format(marker=str(marker)), "b")
    async with recovering(config(model, tmp_path)) as cluster:
        tasks = cluster.start(requests)
        await cluster.until("the hanging step", marker.exists)
        await cluster.until("the loss", lambda: any("is lost" in text for text in cluster.told))
        (lost,) = (text for text in cluster.told if "is lost" in text)
        noticed = (
            r"it hangs: a step has been computed for \S+ s, longer than (\S+) s",
            r"it does not answer: microbatch \d+ has taken \S+ s, longer than the limit of (\S+) s",
        )
        found = [re.match(rf"worker b \(layers \[2, 4\)\) is lost: {how}", lost) for how in noticed]
        assert [True for each in found if each and float(each[1]) < step_limits.UNPREDICTED_S], lost
        assert await asyncio.gather(*tasks) == expected
        await cluster.whole()
