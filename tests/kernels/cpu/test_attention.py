"""Tests of the CPU backend's attention: equal bits in any chunks, batches, blocks and spans."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.kernels.reference.kv import round_to_bytes
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model as OpenModel
from llamaclust.model.program import KV_BLOCK_TOKENS
from support.arithmetic.attention_cases import (
    ERRORS,
    LIMITS,
    MAKERS,
    Float32,
    Model,
    assert_same_bits,
    chunks_of,
    in_float64,
    run_chunks,
)
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import Chain, batch_of
from support.arithmetic.single_steps import error
from support.models.tiny_model import build_tiny_model

MAKERS |= {f"{threads} threads": partial(all_threads, threads) for threads in (1, 3)}


@cache
def _wanted(model: Model, rows: int) -> Float32:
    return in_float64(model, model.hidden(rows)).astype(np.float32)


def wanted_of(model: Model, rows: int) -> Float32:
    """Returns attention by its definition, computed once for all levels and threads."""
    return _wanted(replace(model, folder=Path()), rows)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("shape", [(9, 3, 64), (2, 2, 32), (3, 1, 40), (20, 1, 32), (34, 2, 8), (2, 1, 256)])
@pytest.mark.parametrize("kv_type", KvType)
def test_close_to_float64(
    tmp_path: Path, kv_type: KvType, shape: tuple[int, int, int], make: Callable[[], CpuBackend]
) -> None:
    """Covers groups of 1 to 20 query heads, and head sizes that do not fill whole lanes. The bound allows for a key
    that is rounded the other way: a step of int8 is 16 times one of float16."""
    model = Model(tmp_path, *shape, kv_type)
    hidden = model.hidden(600 if shape == (9, 3, 64) else 90)
    with model.stage(make) as stage:
        found = run_chunks(stage, hidden, [range(len(hidden))])
    assert error(found, wanted_of(model, len(hidden))) < ERRORS[kv_type]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dim", [30, 64, 80])
def test_q8_0_rounds_as_the_reference_does(tmp_path: Path, dim: int, make: Callable[[], CpuBackend]) -> None:
    """A sequence of one position attends only to its own value, so the result has that value's bits. Values include
    zeros, groups whose scale is subnormal in float16, a halfway case, and the largest numbers."""
    model = Model(tmp_path, 2, 2, dim, KvType.Q8_0)
    step = model.program.kv_layers[0]
    count, width = 64, step.kv_heads * step.head_dim
    source = np.random.default_rng(dim)
    hidden = model.hidden(count)
    values = source.standard_normal((count, width)) * 10.0 ** source.uniform(-9, 6.5, (count, 1))
    values[0], values[1, :3] = 0, (127.0, 2.5, -3.5)
    hidden[:, -width:] = values
    batch = batch_of([([0], [0], [index]) for index in range(count)], outputs=[])
    with model.stage(make, replace(LIMITS, max_sequences=count)) as stage:
        found = stage.run(batch, hidden)
    wanted = round_to_bytes(hidden[:, -width:].reshape(count, step.kv_heads, step.head_dim)).values()
    assert len(np.unique(wanted)) > 500
    np.testing.assert_array_equal(found, wanted.reshape(count, width).astype(np.float32))


def test_q8_0_is_near_f16(tmp_path: Path) -> None:
    """Rounding to eight bits causes an error between 1e-6 and 2e-4."""
    models = [Model(tmp_path, 8, 2, 64, kv_type) for kv_type in (KvType.F16, KvType.Q8_0)]
    hidden = models[0].hidden(600)
    exact, rounded = (in_float64(model, hidden) for model in models)
    assert 1e-6 < error(rounded.astype(np.float32), exact.astype(np.float32)) < 2e-4


WINDOWS = [1, 7, 16, 100, 512, 600]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_are_close_to_float64(tmp_path: Path, window: int, make: Callable[[], CpuBackend]) -> None:
    """Covers windows within one span, at its edges and over two spans."""
    model = Model(tmp_path, 4, 2, 32, window=window)
    hidden = model.hidden(700)
    with model.stage(make) as stage:
        found = run_chunks(stage, hidden, [range(len(hidden))])
    assert error(found, wanted_of(model, len(hidden))) < 1e-8


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_changes_nothing_before_it_is_full(tmp_path: Path, window: int) -> None:
    plain, cut = Model(tmp_path, 4, 2, 32), Model(tmp_path, 4, 2, 32, window=window)
    hidden = plain.hidden(window)
    with plain.stage(partial(all_threads, 2)) as stage:
        wanted = run_chunks(stage, hidden, [range(window)])
    with cut.stage(partial(all_threads, 2)) as stage:
        assert_same_bits(run_chunks(stage, hidden, chunks_of(window, 40)), wanted)


@pytest.mark.parametrize(
    ("shape", "rows", "kv_type", "window"),
    [
        ((4, 2, 32), 1100, KvType.F16, None),
        ((4, 2, 32), 1100, KvType.Q8_0, None),
        ((9, 3, 64), 530, KvType.F16, None),
        ((9, 3, 64), 530, KvType.Q8_0, 300),
        ((20, 1, 24), 530, KvType.Q8_0, None),
        ((9, 3, 64), 1100, KvType.INT8, None),
        ((20, 1, 24), 530, KvType.INT8, 300),
    ],
)
def test_same_bits_in_any_chunks_on_any_level_and_threads(
    tmp_path: Path, shape: tuple[int, int, int], rows: int, kv_type: KvType, window: int | None
) -> None:
    model = Model(tmp_path, *shape, kv_type, window)
    hidden = model.hidden(rows)
    with model.stage(partial(all_threads, 1)) as stage:
        wanted = run_chunks(stage, hidden, [range(rows)])
    for make in MAKERS.values():
        with model.stage(make) as stage:
            assert_same_bits(run_chunks(stage, hidden, [range(rows)]), wanted)
            assert_same_bits(run_chunks(stage, hidden, chunks_of(rows, 63)), wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("kv_type", "window"), [*product(KvType, (None, 520)), (KvType.F16, 9)])
def test_same_bits_one_token_at_a_time(tmp_path: Path, kv_type: KvType, window: int | None, threads: int) -> None:
    """Decoding over more than 512 positions divides spans among threads."""
    model = Model(tmp_path, 4, 2, 32, kv_type, window)
    hidden = model.hidden(1100)
    steps = itertools.chain(chunks_of(500, 250), (range(i, i + 1) for i in range(500, 540)), [range(540, 1020)])
    chunks = [*steps, *(range(i, i + 1) for i in range(1020, 1030)), range(1030, 1037), range(1037, 1100)]
    with model.stage(partial(all_threads, threads)) as stage:
        wanted = run_chunks(stage, hidden, [range(1100)])
        assert_same_bits(run_chunks(stage, hidden, chunks), wanted)


@pytest.mark.parametrize("kv_type", KvType)
def test_same_bits_in_any_blocks(tmp_path: Path, kv_type: KvType) -> None:
    model = Model(tmp_path, 6, 2, 32, kv_type)
    hidden = model.hidden(700)
    scattered = np.random.default_rng(5).permutation(LIMITS.kv_blocks)[:44].tolist()
    with model.stage(partial(all_threads, 2)) as stage:
        wanted = run_chunks(stage, hidden, chunks_of(700, 128), range(44))
        assert_same_bits(run_chunks(stage, hidden, chunks_of(700, 128), scattered), wanted)


@pytest.mark.parametrize("chunk", [1, 5, 40])
@pytest.mark.parametrize(("kv_type", "window"), list(product(KvType, (None, 21))))
def test_what_memory_held_before_does_not_matter(
    tmp_path: Path, kv_type: KvType, window: int | None, chunk: int
) -> None:
    model = Model(tmp_path, 4, 2, 40, kv_type, window)
    hidden = model.hidden(80)
    with model.stage(partial(all_threads, 2)) as stage:
        wanted = run_chunks(stage, hidden, [range(80)])
    for stale in (np.nan, np.inf, -np.inf):
        with model.stage(partial(all_threads, 2)) as stage:
            run_chunks(stage, np.full((96, hidden.shape[1]), stale, np.float32), [range(96)])
            assert_same_bits(run_chunks(stage, hidden, chunks_of(80, chunk)), wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("kv_type", "window"), [(KvType.F16, None), (KvType.Q8_0, 530), (KvType.INT8, None)])
def test_same_bits_beside_other_sequences(tmp_path: Path, kv_type: KvType, window: int | None, threads: int) -> None:
    """Sequences in decode or prefill in one batch have the bits of each sequence alone."""
    model = Model(tmp_path, 6, 2, 32, kv_type, window)
    before, now = [600, 0, 17, 1050], [1, 33, 1, 7]
    hidden = [model.hidden(a + b, seed) for seed, (a, b) in enumerate(zip(before, now, strict=True))]
    free = iter(np.random.default_rng(3).permutation(LIMITS.kv_blocks).tolist())
    tables = [[next(free) for _ in range(-(-len(rows) // KV_BLOCK_TOKENS))] for rows in hidden]
    with model.stage(partial(all_threads, threads)) as stage:
        wanted = [
            run_chunks(stage, rows, [range(len(rows))], table) for rows, table in zip(hidden, tables, strict=True)
        ]
        for rows, table, length in zip(hidden, tables, before, strict=True):
            run_chunks(stage, rows, [range(length)] if length else [], table) if length else None
        parts = [
            ([0] * count, range(length, length + count), table)
            for length, count, table in zip(before, now, tables, strict=True)
        ]
        together = stage.run(
            batch_of(parts, outputs=[]), np.concatenate([rows[n:] for rows, n in zip(hidden, before, strict=True)])
        )
        assert_same_bits(together, np.concatenate([rows[n:] for rows, n in zip(wanted, before, strict=True)]))


def test_the_window_of_a_model_file_is_obeyed(tmp_path: Path) -> None:
    """Tokens within the first window have the bits of a model without a window, later tokens do not. Chunks change no
    bits, and the reference agrees."""
    tokens, window = (np.arange(60) * 37 % 311).tolist(), 20
    plain = build_tiny_model(tmp_path / "plain.gguf", layers=2)
    cut = build_tiny_model(tmp_path / "cut.gguf", layers=2, extra={"llama.attention.sliding_window": window})
    every, wanted, expected = (
        Chain(backend, OpenModel.open(path)).logits(tokens, 60)
        for backend, path in ((all_threads(2), plain), (all_threads(2), cut), (ReferenceBackend(), cut))
    )
    assert_same_bits(wanted[:window], every[:window])
    assert (wanted[window:] != every[window:]).any(axis=1).all()
    assert error(wanted, expected) < 2e-3 < error(wanted, every)
    assert_same_bits(Chain(all_threads(2), OpenModel.open(cut)).logits(tokens, 7), wanted)
