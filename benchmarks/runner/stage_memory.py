"""A program that loads a stage, uses all of its buffers, and prints the stage's reported and measured memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from llamaclust.worker.devices.system_info import release_freed_memory
from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner


def load(order: Mapping[str, Any]) -> dict[str, int]:
    limits, threads, start = StageLimits(**order["limits"]), order["threads"], order["start"]
    model, backend = Model.open(order["model"]), CpuBackend(threads)
    release_freed_memory()
    before_bytes = private_bytes()
    runner = StageRunner(backend, model, start, order["end"], limits, StageOptions(threads=threads))
    hidden = np.full((limits.max_batch_tokens, runner.program.hidden.width), 0.01, np.float32)
    for number, chunk in enumerate(chunks_of(limits, runner.program.window, is_last=runner.program.is_last)):
        rows = hidden[: len(chunk.tokens)] if start else None
        runner.run(Microbatch(model.model_id, 1, number, (chunk,)), rows)
    release_freed_memory()
    return {"status": runner.memory.total_bytes, "resident": private_bytes() - before_bytes}


def chunks_of(limits: StageLimits, window: int | None, *, is_last: bool) -> Iterator[Chunk]:
    states = count()
    for first in range(0, limits.kv_blocks, blocks := limits.max_context_tokens // 16):
        for position in range(0, limits.max_context_tokens, limits.max_batch_tokens):
            end = min(position + limits.max_batch_tokens, limits.max_context_tokens)
            reach = max(0, position - (window or 0)) // 16
            held = -(-end // 16) - reach
            at = first // blocks * held % max(limits.window_blocks - held + 1, 1)
            state = next(states) % limits.state_blocks if limits.state_blocks else None
            yield Chunk(
                (1,) * (end - position),
                position,
                (first, -(-end // 16)),
                min(end - position, limits.max_outputs) if is_last else 0,
                window_table=(at, held) if limits.window_blocks else (),
                window_start=reach if limits.window_blocks else 0,
                state_from=None if state is None or not position else (state - 1) % limits.state_blocks,
                state_to=() if state is None else (end - position, state),
            )


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    print(json.dumps(load(json.loads(sys.argv[1]))))
