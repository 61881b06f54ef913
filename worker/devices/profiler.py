"""Measures a model's step times on this worker with three stages: one layer, several layers, and the last layer with
the output head. The rows of a step differ, so that they choose different experts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.core.profile import StepTime
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.backend import Backend, Progress, with_own_threads
from llamaclust.model.costs import LayerCost
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import Deadlines
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from llamaclust.wire.rpc.cache_flush import BYTES as SWEEP_BYTES
from llamaclust.wire.rpc.cache_flush import CacheFlush, largest_cache_bytes
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.loop import StageContext, StageLoop
from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner, plan_memory
from llamaclust.worker.stage.step_inputs import StepInputs

if TYPE_CHECKING:
    from llamaclust.worker.devices.backends import GpuBackend

_DECODE_ROWS = (1, 8)
_ENOUGH_S = 2.0  # Seconds of steps with the same number of rows, after which no more steps are measured.
_CONTEXT = 256  # Number of tokens before a decode step, and on average before a row of a prompt.
_BLOCKS = (_CONTEXT + 16) // 16
_LEAST_LAYERS = 3
_LEAST_BYTES = 32 << 20  # Minimum size of the measured layers. Smaller layers stay in caches.
_EPOCH = 1

Sweep = Callable[[], None]


@dataclass(frozen=True, slots=True)
class ProfileSize:
    # The stage of several layers gets as many layers as read this number of bytes per token, but at least two.
    layers_bytes: int
    # Number of steps to measure, by number of rows. Few rows are sequences in decode, many rows are one prompt.
    tries: Mapping[int, int]

    @property
    def limits(self) -> StageLimits:
        rows = max(self.tries)
        return StageLimits(
            max_batch_tokens=rows,
            max_outputs=_DECODE_ROWS[-1],
            max_sequences=_DECODE_ROWS[-1],
            max_context_tokens=max(_CONTEXT, *(_position(each) + each for each in self.tries)) + 16,
            kv_blocks=_DECODE_ROWS[-1] * _BLOCKS,
        )


PROCESSOR = ProfileSize(96 << 20, {1: 15, 8: 7, 128: 3})
GPU = ProfileSize(1 << 30, {1: 9, 8: 5, 128: 3, 512: 3})
"""More bytes and rows than for a CPU: a GPU reads about ten times as fast, and gains more from many rows."""


_PROMPT_ROWS = 512
"""Rows of an additional step for mixture-of-experts models, because smaller steps read only some of the experts."""


@dataclass(frozen=True, slots=True)
class ProfiledDevice:
    backend: Backend
    threads: int
    feature_level: str
    free_bytes: int
    place: int = 0  # Process id of the worker. Workers with different ids usually measure different layers.
    size: ProfileSize = PROCESSOR
    # Flushes the device's own cache. The CPU's caches are flushed too.
    own_cache: Callable[[], AbstractContextManager[Sweep]] | None = None
    progress: Progress | None = None  # Called with numbers of loaded bytes, and before each step. May raise an error.

    @classmethod
    def gpu(cls, gpu: GpuBackend, threads: int, feature_level: str) -> ProfiledDevice:
        free_bytes = gpu.free_bytes * 3 // 4  # The rest is for the buffer that flushes the cache.
        return cls(gpu, threads, feature_level, free_bytes, size=GPU, own_cache=gpu.cache_flush)

    @contextmanager
    def cold(self, most_bytes: int, left_bytes: int) -> Iterator[Sweep]:
        """Yields a function that flushes caches. On a CPU, it needs at most min(most_bytes, left_bytes) bytes."""
        if self.own_cache is None:
            yield CacheFlush(min(largest_cache_bytes(), most_bytes, left_bytes)).sweep
            return
        processor = CacheFlush()
        with self.own_cache() as sweep:

            def both() -> None:
                sweep()
                processor.sweep()

            yield both

    def left_bytes(self, model: Model, start: int, end: int) -> int:
        return self.free_bytes - plan_memory(self.backend, model, start, end, self.size.limits).total_bytes


@dataclass(frozen=True, slots=True)
class _Part:
    # Bytes of weights and states that a step reads, by number of rows. Embedding and head do not count.
    layers_bytes: Mapping[int, float]
    seconds: Mapping[int, float]


def try_stages(device: ProfiledDevice, model: Model) -> tuple[StepTime, ...]:
    """Measures a model's step times. Returns () if memory is short, the model is too small, or its layers share KV."""
    costs = model.costs(KvType(device.size.limits.kv_type)).layers
    first = _first_tried(costs)
    sizes = [layer.weight_bytes for layer in costs[first:]]
    layers = len(sizes)
    shares_kv = any(layer.kv_source is not None for layer in costs)
    if layers < _LEAST_LAYERS or sum(sizes) < _LEAST_BYTES or shares_kv:
        return ()
    if any(layer.idle_bytes for layer in costs):
        device = replace(device, size=replace(device.size, tries={**device.size.tries, _PROMPT_ROWS: 3}))
    touched = int(costs[first].touched_bytes(1))
    some = max(2, min(layers - 1, device.size.layers_bytes // max(touched, 1)))
    while some > 2 and device.left_bytes(model, first, first + some) < SWEEP_BYTES:
        some = max(2, some * 3 // 4)
    ranges = [(first + start, first + end) for start, end in _ranges(layers, some, device.place)]
    left = [device.left_bytes(model, start, end) for start, end in ranges]
    if sum(sizes[:some]) < _LEAST_BYTES or min(left) < SWEEP_BYTES:
        return ()
    read_bytes = max(SWEEP_BYTES, int(_moved_bytes(costs, 1)))  # Bytes that all stages read for one token.
    left_together = sum(left) - (len(left) - 1) * device.free_bytes
    together = left_together >= SWEEP_BYTES
    with device.cold(read_bytes, left_together if together else min(left)) as sweep:
        measurement = _Measurement(device, model, sweep)
        groups = [ranges] if together else [[tried] for tried in ranges]
        parts = [part for group in groups for part in measurement.parts(group)]
    return tuple(_step_times(*parts))


@dataclass(frozen=True, slots=True)
class _Measurement:
    device: ProfiledDevice
    model: Model
    sweep: Sweep

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[_Part]:
        """Measures one stage per range of layers. Alternates between the stages, so that a disturbance affects all."""
        device, model = self.device, self.model
        limits = device.size.limits
        options = StageOptions(device.feature_level, device.threads, progress=device.progress)
        with ExitStack() as opened:
            runners = []
            for start, end in ranges:
                runner = StageRunner(with_own_threads(device.backend), model, start, end, limits, options)
                runners.append(opened.enter_context(closing(runner)))
            tries = device.size.tries.items()
            seconds = {rows: asyncio.run(self._taken_s(runners, rows, most)) for rows, most in tries}
        costs = model.costs(KvType(limits.kv_type)).layers
        return [
            _Part(
                {rows: _moved_bytes(costs[start:end], rows) for rows in seconds},
                {rows: taken[index] for rows, taken in seconds.items()},
            )
            for index, (start, end) in enumerate(ranges)
        ]

    async def _taken_s(self, runners: Sequence[StageRunner], rows: int, tries: int) -> list[float]:
        """Returns each stage's median seconds per step. Ignores a stage's first step if there are several."""
        vocabulary = self.model.hyperparameters.vocabulary_size
        with closing(Compute()) as compute:
            context = StageContext("profile", compute, Counters())
            loops = [(StageLoop(_EPOCH, runner, context, Deadlines()), runner) for runner in runners]
            times: list[list[float]] = [[] for _ in runners]
            for number in range(tries + 1):
                for (loop, runner), taken in zip(loops, times, strict=True):
                    if sum(taken) <= _ENOUGH_S:
                        taken.append(await self._step_s(loop, runner, _task(runner, vocabulary, rows, number), number))
        return [median(taken[1:] or taken) for taken in times]

    async def _step_s(self, loop: StageLoop, runner: StageRunner, task: tuple[bytes, bytes], number: int) -> float:
        frame, inputs = task
        if self.device.progress is not None:
            self.device.progress(0)
        self.sweep()
        begun_ns = perf_counter_ns()
        if runner.program.is_last:
            loop.dependencies.put_inputs(StepInputs.read(inputs))
        await (await loop.compute(loop.receive(frame, number)))
        return (perf_counter_ns() - begun_ns) / 1e9


def _position(rows: int) -> int:
    return max(0, _CONTEXT - rows // 2) // 16 * 16


def _moved_bytes(layers: Sequence[LayerCost], rows: int) -> float:
    return sum(layer.moved_bytes(rows, rows if rows in _DECODE_ROWS else 1) for layer in layers)


def _first_tried(costs: Sequence[LayerCost]) -> int:
    """Returns the first layer to measure. In a mixture-of-experts model, it is the first layer with experts."""
    first = next((number for number, layer in enumerate(costs) if layer.idle_bytes), 0)
    return first if len(costs) - first >= _LEAST_LAYERS else 0


def _ranges(layers: int, some: int, place: int) -> list[tuple[int, int]]:
    start = place * some % (layers - some)
    return [(start, start + 1), (start, start + some), (layers - 1, layers)]


def _step_times(one: _Part, some: _Part, last: _Part) -> Iterator[StepTime]:
    heads: list[tuple[int, float]] = []
    for rows in one.seconds:
        stage_s, byte_s = _line(*((part.layers_bytes[rows], part.seconds[rows]) for part in (one, some)))
        if rows in _DECODE_ROWS:
            head_s = max(0.0, last.seconds[rows] - stage_s - byte_s * last.layers_bytes[rows])
            heads.append((rows, head_s))
        else:
            # The measured prompts compute no logits, so the output head's time is extrapolated from decode steps.
            (low, low_s), (high, high_s) = heads
            head_s = high_s + (rows - high) / (high - low) * max(0.0, high_s - low_s)
        yield StepTime(rows, stage_s, byte_s, head_s)


def _line(few: tuple[float, float], many: tuple[float, float]) -> tuple[float, float]:
    """Fits a line to two points (bytes, seconds). Returns (seconds at 0 bytes, seconds per byte), both >= 0."""
    byte_s = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
    if byte_s * few[0] > few[1]:
        return 0.0, (few[1] + many[1]) / (few[0] + many[0])
    return few[1] - byte_s * few[0], byte_s


def _task(runner: StageRunner, vocabulary: int, rows: int, number: int) -> tuple[bytes, bytes]:
    """Returns the frame and the sampling inputs of a random microbatch: 1 or 8 decode rows, or one prompt."""
    program, source = runner.program, np.random.default_rng(number)
    tokens = source.integers(vocabulary, size=rows).tolist()
    if rows in _DECODE_ROWS:
        outputs = int(program.is_last)
        chunks = tuple(Chunk((tokens[row],), _CONTEXT, (row * _BLOCKS, _BLOCKS), outputs) for row in range(rows))
    else:
        position = _position(rows)
        chunks = (Chunk(tuple(tokens), position, (0, -(-(position + rows) // 16)), 0),)
    task = SampleTask(SamplingParams(), 0, 0, _CONTEXT + 1)
    header = encode_microbatch(Microbatch(runner.model_id, _EPOCH, number, chunks))
    hidden = None if program.is_first else source.standard_normal((rows, program.hidden.width), np.float32)
    tasks = encode_inputs(SamplingInputs(_EPOCH, number, (task,) * sum(chunk.outputs for chunk in chunks)))
    return encode_hidden(header, hidden), tasks
