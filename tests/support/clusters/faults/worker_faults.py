"""Workers that fail without dying: what their processes run at their start, for one worker by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from textwrap import dedent, indent

import pytest

_PROGRAM = dedent(
    """
    # Runs in every process that the test starts.
    import sys

    if "--name" in sys.orig_argv and {worker!r} in ("", sys.orig_argv[sys.orig_argv.index("--name") + 1]):
        from llamaclust.worker.stage.loop import StageLoop

        run_layers = StageLoop._run_layers
    """
)

RAISES = """
def fails(loop, arrival):
    raise ValueError("broken")

StageLoop._run_layers = fails
"""
SOME_ROWS = """
def fails(loop, arrival):
    chunks = arrival.microbatch.chunks
    if any(chunk.position <= 31 < chunk.position + len(chunk.tokens) for chunk in chunks):
        raise ValueError("broken")
    return run_layers(loop, arrival)

StageLoop._run_layers = fails
"""


def break_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, worker: str, fault: str) -> None:
    """Of clusters that are started from now on. Without a name, each worker."""
    (folder / "sitecustomize.py").write_text(_PROGRAM.format(worker=worker) + indent(fault, "    "))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), *filter(None, sys.path))))


MUTE = """
async def sends_nothing(loop, *given):
    pass

StageLoop._send_answers = sends_nothing
"""
DEAF = """
import asyncio
from llamaclust.worker.stage.incoming import Incoming

async def reads_nothing(incoming, sending):
    await asyncio.Event().wait()

Incoming.next = reads_nothing
"""
MUTE_TO_FIRST = """
async def sends_nothing(loop, *given):
    pass

StageLoop._send_tokens = sends_nothing
"""
DEFERS = """
from dataclasses import replace
from llamaclust.wire.microbatch.codec import decode_result, encode_result
from llamaclust.worker.stage.outputs import NativeOutputs

encode = NativeOutputs.encode

def defers(outputs, *given):
    result = decode_result(encode(outputs, *given))
    rows = tuple(replace(row, token=-1, logprob=float("nan"), is_deferred=True) for row in result.rows)
    return encode_result(replace(result, rows=rows))

NativeOutputs.encode = defers
"""
NOT_FINITE = """
import numpy as np

def not_finite(loop, arrival):
    return np.full_like(np.asarray(run_layers(loop, arrival)), np.nan)

StageLoop._run_layers = not_finite
"""
NOT_FINITE_SEED = 666
NOT_FINITE_FOR_ONE = f"""
import numpy as np

finish = StageLoop._finish

def not_finite(loop, arrival, logits, received):
    rows = [row for row, task in enumerate(received.inputs.tasks) if getattr(task, "seed", 0) == {NOT_FINITE_SEED}]
    if rows:
        logits = np.array(logits)
        logits[rows] = np.nan
    return finish(loop, arrival, logits, received)

StageLoop._finish = not_finite
"""
