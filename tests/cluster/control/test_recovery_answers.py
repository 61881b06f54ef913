"""Workers whose answers are not to be believed: they are given up like lost ones, and no token changes."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.recovering import Answer, config, recovering

TOKENS = 100

_BEGIN = """
# Runs in every process that the test starts: the worker named {worker} answers wrongly once, at its {at}th answer.
import os, sys
from dataclasses import replace
from itertools import count

if "--name" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("--name") + 1] == "{worker}":
    answers = count()
"""
_RESULT = (
    _BEGIN
    + """
    from llamaclust.wire.microbatch.results import decode_result
    from llamaclust.worker.stage.loop import StageLoop
    from support.wire.slow_codec import encode_result as encode

    right = StageLoop._result

    def wrong(loop, *given):
        answer = right(loop, *given)
        if next(answers) >= {at} and not os.path.exists({marker!r}):
            open({marker!r}, "w").close()
            message = decode_result(answer.data)
            return replace(answer, data={answer})
        return answer

    StageLoop._result = wrong
"""
)
_HEARTBEAT = (
    _BEGIN
    + """
    import llamaclust.wire.control.codec as codec

    encode = codec.encode_worker_message

    def wrong(message):
        if type(message).__name__ == "Heartbeat" and next(answers) >= {at} and not os.path.exists({marker!r}):
            open({marker!r}, "w").close()
            return {answer}
        return encode(message)

    codec.encode_worker_message = wrong
"""
)

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
    (tmp_path / "sitecustomize.py").write_text(program.format(worker="c", at=at, answer=answer, marker=str(marker)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), *filter(None, sys.path))))

    async with recovering(config(model, tmp_path)) as cluster:
        answers = await asyncio.gather(*cluster.start(requests))
        await cluster.until("the wrong answer", marker.exists)
        await cluster.until("the loss", lambda: any("is lost" in text for text in cluster.told))
        (lost,) = (text for text in cluster.told if "is lost" in text)
        assert lost.startswith("worker c (layers [4, 6)) is lost: ") and says in lost
        assert answers == expected
        await cluster.whole()


_HANGING = dedent(
    """
    # Runs in every process that the test starts: the compute thread of worker b hangs once, in a step.
    import os, sys, threading

    if "--name" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("--name") + 1] == "b":
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
)


async def test_a_compute_thread_that_hangs_is_noticed_by_the_predicted_time(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "hangs"
    (tmp_path / "sitecustomize.py").write_text(_HANGING.format(marker=str(marker)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), *filter(None, sys.path))))
    async with recovering(config(model, tmp_path)) as cluster:
        tasks = cluster.start(requests)
        await cluster.until("the hanging step", marker.exists)
        await cluster.until("the loss", lambda: any("is lost" in text for text in cluster.told), within_s=6.0)
        (lost,) = (text for text in cluster.told if "is lost" in text)
        noticed = ("it hangs: a step has been computed for ", "it does not answer: microbatch ")
        assert any(lost.startswith(f"worker b (layers [2, 4)) is lost: {how}") for how in noticed), lost
        assert await asyncio.gather(*tasks) == expected
        await cluster.whole()
