"""Checks that states of sequences give the CPU's bits on a GPU, in any batches, with and without state blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Batch, BatchStates
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.executor.state_places import StatePlaces, state_places
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.program import Buffer, Convolution, Program, Scan, Slice
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.states import Decay, DeltaRule
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.single_steps import Weight, normal, program_of, splitter
from support.cuda.exact import same_bits
from support.cuda.random_numbers import generator
from support.cuda.stages import LIMITS, Open, random_tokens, same

LENGTHS = (60, 33, 90)


def random_batches(source: np.random.Generator) -> list[Batch]:
    """Builds batches of sequences that grow together by random numbers of rows, some by fewer than a state covers."""
    blocks = source.permutation(LIMITS.kv_blocks)
    tables = np.split(blocks[: 3 * 6], 3)
    at, batches = [0, 0, 0], []
    while any(start < length for start, length in zip(at, LENGTHS, strict=True)):
        parts, room = [], LIMITS.max_batch_tokens
        for n, length in enumerate(LENGTHS):
            count = min(length - at[n], room, int(source.choice([0, 1, 1, 2, 5, 17])))
            if count:
                parts.append(([0] * count, range(at[n], at[n] + count), tables[n]))
                at[n], room = at[n] + count, room - count
        if parts:
            batches.append(batch_of(parts))
    return batches


def check(
    folder: Path, backends: tuple[CpuBackend, CudaBackend], program: Program, weights: Mapping[str, Weight]
) -> None:
    """Checks that both backends give the same bits for random batches."""
    path, source = folder / "weights.gguf", generator()
    write_gguf(path, {}, [weight.source(name) for name, weight in weights.items()])
    tensors = dict(open_model(path).tensors)
    stages = [backend.load(program, tensors, LIMITS, lambda _: None) for backend in backends]
    for batch in random_batches(source):
        hidden = normal(source, batch.rows, program.hidden.width)
        wanted, found = (stage.run(batch, hidden).copy() for stage in stages)
        same_bits(found, wanted)
    for stage in stages:
        stage.close()


@pytest.mark.parametrize(
    ("taps", "width", "bias", "kind"),
    [
        (2, 16, False, QuantType.F32),
        (3, 300, True, QuantType.F16),
        (4, 272, False, QuantType.BF16),
        (16, 48, True, QuantType.F32),
    ],
)
def test_convolutions(
    tmp_path: Path, cpu: CpuBackend, cuda: CudaBackend, taps: int, width: int, bias: bool, kind: QuantType
) -> None:
    source, x, out = generator(), Buffer("x", width), Buffer("out", width)
    weights = {"weight": Weight(normal(source, width, taps), kind), "bias": Weight(normal(source, width))}
    step = Convolution(x, out, "weight", taps, 1, "bias" if bias else None)
    check(tmp_path, (cpu, cuda), program_of(x, out, step), weights)


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize(
    ("heads", "key_heads", "keys", "values", "tiled"),
    [(1, 1, 1, 16, False), (4, 2, 16, 16, True), (6, 2, 7, 80, False), (2, 1, 256, 32, True)],
)
def test_delta_rules(
    tmp_path: Path,
    cpu: CpuBackend,
    cuda: CudaBackend,
    heads: int,
    key_heads: int,
    keys: int,
    values: int,
    tiled: bool,
    per_key: bool,
) -> None:
    source = generator()
    q, k = (Buffer(name, key_heads * keys) for name in ("q", "k"))
    v, out = (Buffer(name, heads * values) for name in ("v", "out"))
    parts = [q, k, v, decay := Buffer("decay", heads * (keys if per_key else 1)), beta := Buffer("beta", heads)]
    x = Buffer("x", sum(part.width for part in parts))
    copies, weights = splitter(x, parts)
    weights["a"] = Weight(source.uniform(-0.5, -0.01, heads).astype(np.float32))
    weights["dt"] = Weight(normal(source, decay.width) + np.float32(2))
    steps = Decay(decay, decay, "a", "dt", heads), DeltaRule(q, k, v, decay, beta, out, 1, heads, key_heads, tiled)
    check(tmp_path, (cpu, cuda), program_of(x, out, *copies, *steps), weights)


@pytest.mark.parametrize(
    ("heads", "channels", "groups", "state_size"),
    [(1, 16, 1, 1), (4, 64, 1, 128), (6, 24, 3, 20), (16, 5, 4, 16), (2, 40, 1, 700), (1, 6, 1, 4096)],
)
def test_scans(
    tmp_path: Path, cpu: CpuBackend, cuda: CudaBackend, heads: int, channels: int, groups: int, state_size: int
) -> None:
    """Covers heads that fill a block and others, and large states, with fewer channels per block."""
    source = generator()
    x, dt = Buffer("x", heads * channels + 2 * groups * state_size), Buffer("dt", heads)
    hidden, out = Buffer("hidden", x.width + heads), Buffer("out", heads * channels)
    weights = {
        "bias": Weight(normal(source, heads)),
        "decay": Weight(-np.abs(normal(source, heads, 1))),
        "skip": Weight(normal(source, heads, 1)),
    }
    steps = Slice(hidden, x, 0), Slice(hidden, dt, x.width), Scan(x, dt, out, "bias", "decay", "skip", groups, 1)
    check(tmp_path, (cpu, cuda), program_of(hidden, out, *steps), weights)


def own_states(before: list[int], starts: list[int], rows: list[int], blocks: list[int]) -> BatchStates:
    return BatchStates(*(np.array(numbers, np.int32) for numbers in (before, starts, rows, blocks)))


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "falcon-h1"])
def test_states_in_blocks_of_their_own(opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str) -> None:
    """States overwrite the blocks from which they were read, except one from which another sequence continues."""
    model, limits = opened(name), replace(LIMITS, state_blocks=3)
    tokens = random_tokens(model, 90)
    stages = [load_stage(backend, model, limits=limits) for backend in (cpu, cuda)]
    first = own_states([-1], [0, 2], [15, 29], [2, 0])
    later = own_states([0], [0, 1], [19], [0])
    beside = own_states([2], [0, 1], [9], [1])
    for start, end, states in ((0, 30, first), (30, 50, later), (50, 70, later), (16, 26, beside)):
        batch = replace(batch_of([(tokens[start:end], range(start, end), range(6))]), states=states)
        wanted, found = (stage.run(batch, None).copy() for stage in stages)
        same(found, wanted)
    for stage in stages:
        stage.close()


def test_places_of_states() -> None:
    """A state is stored after the last row in each block; the first row of a sequence reads none."""
    batch = batch_of([([0] * 20, range(14, 34), [7, 3, 9]), ([0], [0], [5]), ([0], [16], [4, 8])])
    assert state_places(batch, LIMITS) == StatePlaces([7, -1, 4], [0, 3, 4, 5], [1, 17, 19, 20, 21], [7, 3, 9, 5, 8])
    own = replace(batch, states=own_states([2, 9, 4], [0, 2, 3, 4], [3, 19, 20, 21], [1, 2, 3, 0]))
    places = state_places(own, replace(LIMITS, state_blocks=5))
    assert places == StatePlaces([2, -1, 4], [0, 2, 3, 4], [3, 19, 20, 21], [1, 2, 3, 0])


def test_a_state_that_is_not_there_is_refused(opened: Open, cuda: CudaBackend) -> None:
    limits = replace(LIMITS, state_blocks=4)
    stage = load_stage(cuda, opened("lfm2"), limits=limits)
    batch = batch_of([([5], [32], [0, 1, 2])])
    stage.run(replace(batch, states=own_states([3], [0, 1], [0], [3])), None)
    for before, row, block in ((-1, 0, 3), (4, 0, 3), (3, 0, 4), (3, 0, -1), (3, 1, 3)):
        with pytest.raises(ValueError, match=r"batch: .*state"):
            stage.run(replace(batch, states=own_states([before], [0, 1], [row], [block])), None)
    with pytest.raises(ValueError, match="states are missing for 1 sequences"):
        stage.run(batch, None)
    stage.close()


@pytest.mark.parametrize(
    ("before", "starts", "rows", "blocks", "message"),
    [
        ([2], [0, 2, 3], [3, 19, 20], [1, 2, 3], "number of states before sequences is 1, expected 2"),
        ([2, 4], [0, 3], [3, 19, 20], [1, 2, 3], "number of starts of states is 2, expected 3"),
        ([2, 4], [0, 2, 3], [3, 19, 20], [1, 2], "number of blocks of states is 2, expected 3"),
        ([2, 4], [1, 2, 3], [3, 19, 20], [1, 2, 3], "first start of states is 1, expected 0"),
        ([2, 4], [0, 2, 4], [3, 19, 20], [1, 2, 3], "last start of states is 4, expected 3"),
        ([2, 4], [0, 3, 3], [3, 19, 20], [1, 2, 3], "end of a sequence's states is 3, expected 4 or more"),
        ([2, 4], [0, 4, 3], [3, 19, 20], [1, 2, 3], "end of a sequence's states is 3, expected 5 or more"),
        ([-1, 4], [0, 2, 3], [3, 19, 20], [1, 2, 3], r"state block is -1, outside \[0, 5\)"),
        ([2, 5], [0, 2, 3], [3, 19, 20], [1, 2, 3], r"state block is 5, outside \[0, 5\)"),
        ([2, 4], [0, 2, 3], [3, 19, 20], [-1, 2, 3], r"state block is -1, outside \[0, 5\)"),
        ([2, 4], [0, 2, 3], [-1, 19, 20], [1, 2, 3], r"row of a state is -1, outside \[0, 20\)"),
        ([2, 4], [0, 2, 3], [20, 19, 20], [1, 2, 3], r"row of a state is 20, outside \[0, 20\)"),
        ([2, 4], [0, 3, 4], [5, 3, 19, 20], [1, 2, 3, 0], r"row of a state is 3, outside \[6, 20\)"),
        ([2, 4], [0, 2, 4], [3, 19, 7, 20], [1, 2, 3, 0], r"row of a state is 7, outside \[20, 21\)"),
        ([2, 4], [0, 2, 3], [3, 18, 20], [1, 2, 3], "last state is after row 18, expected 19"),
    ],
)
def test_states_of_no_use_are_refused(
    before: list[int], starts: list[int], rows: list[int], blocks: list[int], message: str
) -> None:
    """The checks are those of the CPU's executor, so that kernels never get states that it rejects."""
    batch = batch_of([([0] * 20, range(14, 34), [7, 3, 9]), ([0], [16], [4, 8])])
    states = own_states(before, starts, rows, blocks)
    with pytest.raises(ValueError, match=f"batch: {message}$"):
        state_places(replace(batch, states=states), replace(LIMITS, state_blocks=5))


def test_tables_of_windows_are_as_long_as_those_of_blocks(opened: Open, cuda: CudaBackend) -> None:
    stage = load_stage(cuda, opened("gemma2"), limits=replace(LIMITS, window_blocks=4))
    batch = batch_of([([5], [32], [0, 1, 2])])
    for tables, entries in ((None, 0), (np.array([0, 1], np.int32), 2)):
        with pytest.raises(ValueError, match=f"window_tables is {entries}, expected 3, as many as block_tables"):
            stage.run(replace(batch, window_tables=tables), None)
    stage.close()
