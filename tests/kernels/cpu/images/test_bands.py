"""Tests of large encoder batches, which are computed in bands of rows: the bits of small batches, and memory for one
band."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.cpu.backend import CpuBackend, workspace_bytes
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.program import (
    KV_BLOCK_TOKENS,
    Activate,
    Add,
    Attention,
    Buffer,
    Join,
    MatMul,
    MergeRows,
    SelectRows,
    Step,
)
from llamaclust.model.steps.options import ActivationFunction
from support.arithmetic.backends import BACKENDS
from support.arithmetic.batches import batch_of
from support.arithmetic.conformance_cases import EXACT, generator_of
from support.arithmetic.single_steps import Weight, error, normal, program_of, rows_at

WIDTH, HEADS, INNER, GROUP, MERGED = 32, 2, 80, 48, 4
X, FIRST, LAST = (Buffer(name, WIDTH) for name in ("x", "first", "last"))
FEW, OUT = Buffer("few", WIDTH), Buffer("out", 40)
SHAPES = dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)) | {
    "up": (INNER, WIDTH),
    "down": (WIDTH, INNER),
    "merger": (OUT.width, MERGED * 2 * WIDTH),
    "head": (OUT.width, WIDTH),
}


def layer(x: Buffer, out: Buffer, *, grouped: bool = True) -> tuple[Step, ...]:
    q, k, v, attended, projected = (Buffer(name, WIDTH) for name in ("q", "k", "v", "attended", "projected"))
    up, inner = Buffer("up", INNER), Buffer("inner", INNER)
    attention = Attention(q, k, v, attended, 1, HEADS, HEADS, WIDTH // HEADS, scale=0.25, causal=False, grouped=grouped)
    return (
        *(MatMul(x, buffer, buffer.name) for buffer in (q, k, v)),
        attention,
        MatMul(attended, projected, "o"),
        Add(x, projected, out),
        MatMul(out, up, "up"),
        Activate(up, inner, ActivationFunction.GELU_ERF),
        MatMul(inner, projected, "down"),
        Add(out, projected, out),
    )


def encoder() -> tuple[Step, ...]:
    """Builds an encoder of two layers whose results are joined and merged."""
    joined, merged = Buffer("joined", 2 * WIDTH), Buffer("merged", MERGED * 2 * WIDTH)
    ends = Join(LAST, FIRST, joined), MergeRows(joined, merged, MERGED), MatMul(merged, OUT, "merger")
    return *layer(X, FIRST), *layer(FIRST, LAST), *ends


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    path, generator = tmp_path_factory.mktemp("bands") / "w.gguf", generator_of(5)
    weights = {name: Weight((normal(generator, *shape) / 8).astype(np.float32)) for name, shape in SHAPES.items()}
    write_gguf(path, {}, [weight.source(name) for name, weight in weights.items()])
    return open_model(path).tensors


def limits_of(rows: int, outputs: int = 1) -> StageLimits:
    return StageLimits(rows, outputs, 3, rows, 3 * -(-rows // KV_BLOCK_TOKENS))


def run(
    name: str, steps: tuple[Step, ...], tensors: Mapping[str, Tensor], runs: list[tuple[Batch, Float32]], rows: int
) -> Float32:
    program, limits = program_of(X, steps[-1].out, *steps), replace(limits_of(4096, 3), max_batch_tokens=rows)
    used = {weight: tensors[weight] for weight in program.weights}
    stage = BACKENDS[name]().load(program, used, limits, lambda done_bytes: None)
    found = [stage.run(batch, hidden).copy() for batch, hidden in runs]
    stage.close()
    return np.concatenate(found)


def in_groups(positions: range) -> Batch:
    starts = np.array(positions, np.int32) // GROUP * GROUP
    groups = np.stack((starts, starts + GROUP), axis=1)
    return replace(rows_at(positions), output_rows=np.empty(0, np.int32), groups=groups)


@pytest.mark.parametrize("rows", [1200, 2304])
def test_rows_have_the_bits_of_short_runs(tensors: Mapping[str, Tensor], rows: int) -> None:
    """Rows attend only to their group of 48, so groups can also be computed separately."""
    hidden, steps = normal(generator_of(rows), rows, WIDTH), encoder()
    pieces = [range(start, start + 240) for start in range(0, rows - rows % 240, 240)] + (
        [range(rows - rows % 240, rows)] if rows % 240 else []
    )
    apart = [(in_groups(piece), hidden[piece.start : piece.stop]) for piece in pieces]
    wanted = run("cpu-1-thread", steps, tensors, apart, 240)
    together = [(in_groups(range(rows)), hidden)]
    for name in BACKENDS:
        found = run(name, steps, tensors, together, rows)
        if name == "reference":
            assert error(wanted, found) <= EXACT
        else:
            np.testing.assert_array_equal(found.view("u4"), wanted.view("u4"), name)


@pytest.mark.parametrize("name", ["cpu-1-thread", "cpu-3-threads"])
def test_rows_are_selected_behind_bands(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Covers three sequences, as in text encoders; the second one is in two bands."""
    counts = 700, 800, 640
    steps = (*layer(X, FIRST, grouped=False), SelectRows(FIRST, FEW), MatMul(FEW, OUT, "head"))
    hidden = [normal(generator_of(count), count, WIDTH) for count in counts]
    tables = [range(50 * number, 50 * number + 50) for number in range(3)]
    sequences = [([0] * count, range(count), table) for count, table in zip(counts, tables, strict=True)]
    ends = np.cumsum(counts) - 1
    apart = [
        (batch_of([sequence], outputs=[count - 1]), rows)
        for sequence, rows, count in zip(sequences, hidden, counts, strict=True)
    ]
    wanted = run("cpu-1-thread", steps, tensors, apart, 800)
    found = run(name, steps, tensors, [(batch_of(sequences, outputs=ends), np.concatenate(hidden))], sum(counts))
    np.testing.assert_array_equal(found.view("u4"), wanted.view("u4"))


def test_a_stage_that_has_bands_computes_short_runs(tensors: Mapping[str, Tensor]) -> None:
    steps, rows = encoder(), (4, 16, 48, 1020, 1024)
    runs = [(rows_at(range(count)), normal(generator_of(count), count, WIDTH)) for count in rows]
    found, wanted = (run("cpu-3-threads", steps, tensors, runs, most) for most in (4096, 1024))
    np.testing.assert_array_equal(found.view("u4"), wanted.view("u4"))


def test_all_rows_have_room_where_all_are_needed(tensors: Mapping[str, Tensor]) -> None:
    """x, q, attention's result and the first layer's result have memory for all rows, the final result for a fourth of
    them. Keys and values are stored band by band."""
    steps = encoder()
    program = program_of(X, OUT, *steps)
    used = {weight: tensors[weight] for weight in program.weights}
    shorter, longer = (workspace_bytes(program, used, limits_of(rows), 1) for rows in (8192, 16384))
    assert longer - shorter == 4 * 8192 * (4 * WIDTH + OUT.width // MERGED)
    stage = CpuBackend(1).load(program, used, limits_of(8192), lambda done_bytes: None)
    assert stage.workspace_bytes == shorter


def test_merged_rows_have_room_for_as_many(tensors: Mapping[str, Tensor]) -> None:
    """A program without attention has no bands."""
    wide = Buffer("wide", MERGED * WIDTH)
    steps = MatMul(X, FIRST, "q"), MergeRows(FIRST, wide, MERGED), Add(wide, wide, wide), Add(wide, wide, wide)
    program = program_of(X, wide, *steps)
    used = {weight: tensors[weight] for weight in program.weights}
    fewer, more = (workspace_bytes(program, used, limits_of(rows), 1) for rows in (4096, 8192))
    x, product, quantized, merged, result = 5 * (WIDTH,)
    assert more - fewer == 4 * 4096 * (x + product + quantized + merged + result)
