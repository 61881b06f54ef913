"""Faults of workers whose processes keep running, for all workers or a named one.

Failing steps and silence are those of `llamaclust chaos`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError, ProtocolError
from llamaclust.kernels._native import MicrobatchFrame, PythonGatherer, RowOutcomes
from llamaclust.kernels.backend import Logits
from llamaclust.kernels.gathers import bands_of, borders_in
from llamaclust.kernels.sampling import set_result
from llamaclust.model.steps.across import Gather
from llamaclust.tools.chaos.worker_faults import break_steps, silence
from llamaclust.worker.stage import leading
from llamaclust.worker.stage.incoming import Incoming
from llamaclust.worker.stage.loop import Answer, StageLoop
from llamaclust.worker.stage.matched_answer import DEFERRED
from llamaclust.worker.stage.stage_runner import StageRunner
from llamaclust.worker.stage.step_inputs import StepInputs
from llamaclust.worker.weights.weights import Weights
from support.clusters.faults.worker_program import run_in_workers
from support.wire.slow_codec import plain_inputs

_ROW = 31
"""The position whose rows fail under `raises for some rows`."""
NOT_FINITE_SEED = 666
_ROOM = np.zeros((1, 3), np.float32), [0, 1, 2, 3]
"""A row and the borders of three members' columns, one column each."""
_PROGRAM = """
from support.clusters.faults.worker_faults import FAULTS

FAULTS[{fault!r}]()
"""


def break_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, worker: str, fault: str) -> None:
    """Gives the named worker a fault in clusters that start later; without a name, gives it to all workers."""
    run_in_workers(monkeypatch, folder, _PROGRAM.format(fault=fault), worker)


def _always() -> bool:
    return True


def _break_some_rows() -> None:
    run_layers = StageLoop._run_layers

    def fails(loop: StageLoop, arrival: Any) -> Any:
        if _ROW in arrival.frame.arrays[1]:
            raise ValueError("broken")
        return run_layers(loop, arrival)

    StageLoop._run_layers = fails  # type: ignore[method-assign, assignment]


def _spoil_numbers() -> None:
    run_layers = StageLoop._run_layers

    def not_finite(loop: StageLoop, arrival: Any) -> Any:
        return np.full_like(np.asarray(run_layers(loop, arrival)), np.nan)

    StageLoop._run_layers = not_finite  # type: ignore[method-assign, assignment]


def _spoil_numbers_of_one() -> None:
    finish, read, seeds = StageLoop._finish, StepInputs.read, dict[int, list[int]]()

    def notes(data: bytes) -> StepInputs:
        inputs = plain_inputs(data)
        seeds[inputs.number] = [getattr(task, "seed", 0) for task in inputs.tasks]
        return read(data)

    def not_finite(loop: StageLoop, arrival: Any, logits: Logits, received: Any) -> Any:
        if rows := [row for row, seed in enumerate(seeds.pop(arrival.frame.number)) if seed == NOT_FINITE_SEED]:
            logits = np.array(logits)
            logits[rows] = np.nan
        return finish(loop, arrival, logits, received)

    StepInputs.read = notes  # type: ignore[method-assign]
    StageLoop._finish = not_finite  # type: ignore[method-assign, assignment]


def _read_nothing() -> None:
    async def reads_nothing(incoming: Incoming, sending: Any) -> None:
        await asyncio.Event().wait()

    Incoming.next = reads_nothing  # type: ignore[method-assign, assignment]


def _silence_to_first() -> None:
    async def sends_nothing(loop: StageLoop, *given: Any) -> None: ...

    StageLoop._send_tokens = sends_nothing  # type: ignore[method-assign, assignment]


def _defer() -> None:
    sample = StageRunner.sample

    def defers(runner: StageRunner, *given: Any) -> RowOutcomes:
        outcomes = sample(runner, *given)
        for place in range(len(outcomes.rows)):
            set_result(outcomes, place, DEFERRED)
        return outcomes

    StageRunner.sample = defers  # type: ignore[method-assign, assignment]


def _fail_in_step(error: type[Exception]) -> Callable[[], None]:
    """Returns a function that makes steps fail after the other members have begun them and wait at a gather."""

    def install() -> None:
        def fails(runner: StageRunner, frame: MicrobatchFrame) -> Any:
            raise error("a fault of a test")

        StageRunner.run_frame = fails  # type: ignore[method-assign, assignment]

    return install


def _at_step(fault: Callable[[Any, int, int], None]) -> Callable[[], None]:
    """Returns a function that installs a fault of the member's links in an epoch's first step, before it computes."""

    def install() -> None:
        gather_by, run = StageRunner.gather_by, StageRunner.run_frame
        held: dict[StageRunner, Any] = {}

        def keeps(runner: StageRunner, links: Any) -> None:
            held[runner] = links
            gather_by(runner, links)

        def faulty(runner: StageRunner, frame: MicrobatchFrame) -> Any:
            if frame.number == 0:
                fault(held[runner], frame.epoch, frame.number)
            return run(runner, frame)

        StageRunner.gather_by = keeps  # type: ignore[method-assign, assignment]
        StageRunner.run_frame = faulty  # type: ignore[method-assign, assignment]

    return install


def _spoil_portion() -> None:
    """Makes a column of the member's portion NaN in each gather, as damaged weights or memory would."""
    gather_by, run, rows = StageRunner.gather_by, StageRunner.run_frame, [1]
    held: dict[StageRunner, tuple[Any, Any]] = {}

    def counts(runner: StageRunner, frame: MicrobatchFrame) -> Any:
        rows[0] = frame.rows
        spoiling, gatherer = held[runner]
        spoiling.bands = gatherer.bands
        return run(runner, frame)

    def spoils(runner: StageRunner, gatherer: Any) -> None:
        gathers = [step for step in runner.program.steps if isinstance(step, Gather)]

        def gather(number: int, own: Any, whole: Any) -> None:
            step = gathers[number // bands_of(runner.program, rows[0], gatherer.bands)]
            own[:, -1:] = np.nan
            gatherer.gather(number, own, whole, borders_in(step, whole.shape[1]), step.to)

        held[runner] = PythonGatherer(gather), gatherer
        gather_by(runner, held[runner][0])

    StageRunner.run_frame = counts  # type: ignore[method-assign, assignment]
    StageRunner.gather_by = spoils  # type: ignore[method-assign, assignment]


def _hang(links: Any, epoch: int, step: int) -> None:
    threading.Event().wait()


def _send_rubbish() -> None:
    send = StageLoop._send_answers

    async def sends_rubbish(loop: StageLoop, outlet: Any, limit: Any, answers: list[Answer]) -> None:
        await send(loop, outlet, limit, [replace(answer, data=b"rubbish") for answer in answers])

    StageLoop._send_answers = sends_rubbish  # type: ignore[method-assign, assignment]


def _announce_rubbish() -> None:
    def rubbish(*given: Any) -> bytes:
        return b"no step"

    leading.encode_step = rubbish  # type: ignore[assignment]


def _damage_file() -> None:
    def is_damaged(weights: Weights, model_path: str, *given: Any) -> None:
        raise ModelFileError(f"{model_path}: it is damaged")

    Weights.open_file = is_damaged  # type: ignore[method-assign, assignment]


FAULTS: Mapping[str, Callable[[], None]] = {
    "raises": partial(break_steps, _always),
    "raises for some rows": _break_some_rows,
    "not finite": _spoil_numbers,
    "not finite for one": _spoil_numbers_of_one,
    "mute": partial(silence, _always),
    "mute to the first": _silence_to_first,
    "deaf": _read_nothing,
    "defers": _defer,
    "damaged file": _damage_file,
    "no memory in a step": _fail_in_step(MemoryError),
    "breaks the protocol in a step": _fail_in_step(ProtocolError),
    "another epoch": _at_step(lambda links, epoch, step: links.begin(epoch + 1, step)),
    "another step": _at_step(lambda links, epoch, step: links.begin(epoch, step + 1)),
    "another gather": _at_step(lambda links, epoch, step: links.gather(5, np.zeros((1, 1), np.float32), *_ROOM)),
    "closes its links": _at_step(lambda links, epoch, step: links.close()),
    "stuck in a step": _at_step(_hang),
    "a portion that is not finite": _spoil_portion,
    "announces rubbish": _announce_rubbish,
    "sends rubbish": _send_rubbish,
}
