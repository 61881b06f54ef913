"""Tests of the CPU backend's latent attention, whose values are the first channels of its keys, and of products by
head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels import _native
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import KV_BLOCK_TOKENS, Attention, Buffer, HeadMatMul, Join, Program, Slice
from llamaclust.model.quant_types import ActivationFormat, QuantType
from support.arithmetic.attention_cases import (
    ERRORS,
    LIMITS,
    MAKERS,
    assert_same_bits,
    chunks_of,
    rounded,
    run_chunks,
)
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import batch_of
from support.arithmetic.conformance_cases import EXACT, generator_of, whole_numbers
from support.arithmetic.single_steps import Case, Weight, check_conformance, error, normal, program_of, rows_at

Float32 = NDArray[np.float32]

MAKERS |= {f"{threads} threads": partial(all_threads, threads) for threads in (1, 3)}


@dataclass(frozen=True, slots=True)
class Latent:
    """Attention whose hidden state is the concatenated queries and keys."""

    heads: int
    key: int
    value: int
    kv_type: KvType = KvType.F16

    @property
    def program(self) -> Program:
        query, key, out = (
            Buffer("q", self.heads * self.key),
            Buffer("k", self.key),
            Buffer("o", self.heads * self.value),
        )
        x = Buffer("x", query.width + key.width)
        step = Attention(query, key, None, out, 1, self.heads, 1, self.key, 1 / self.key**0.5, self.kv_type)
        return program_of(x, out, Slice(x, query, 0), Slice(x, key, query.width), step)

    @property
    def step(self) -> Attention:
        (step,) = self.program.kv_layers
        return step

    def hidden(self, rows: int, seed: int = 1) -> Float32:
        return normal(np.random.default_rng([self.heads, self.key, seed]), rows, self.program.hidden.width)

    @contextmanager
    def stage(self, make: Callable[[], CpuBackend]) -> Iterator[CpuStage]:
        stage = make().load(self.program, {}, LIMITS, lambda done_bytes: None)
        yield stage
        stage.close()

    def in_float64(self, hidden: Float32) -> NDArray[np.float64]:
        """Returns attention in float64 by its definition, on rounded keys."""
        rows = len(hidden)
        q, k = np.split(hidden.astype(np.float64), [self.heads * self.key], axis=1)
        keys = rounded(k[:, None], self.kv_type)[:, 0]
        scores = q.reshape(rows, self.heads, self.key).transpose(1, 0, 2) @ keys.T * self.step.scale
        scores[:, np.triu(np.ones((rows, rows), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        out: NDArray[np.float64] = (weights @ keys[:, : self.value]).transpose(1, 0, 2).reshape(rows, -1)
        return out


SHAPES = [(1, 576, 512), (3, 40, 32), (16, 48, 40), (20, 37, 30), (72, 24, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_type", KvType)
def test_close_to_float64_and_the_same_bits_everywhere(shape: tuple[int, int, int], kv_type: KvType) -> None:
    """Covers groups larger than a tile, keys and values that fill neither lanes nor groups, and several spans."""
    latent = Latent(*shape, kv_type)
    hidden = latent.hidden(1100 if shape[0] == 3 else 90)
    wanted: Float32 | None = None
    for name, make in MAKERS.items():
        with latent.stage(make) as stage:
            found = run_chunks(stage, hidden, [range(len(hidden))])
            if wanted is None:
                assert error(found, latent.in_float64(hidden).astype(np.float32)) < ERRORS[kv_type], name
                wanted = found
            assert_same_bits(found, wanted)
            assert_same_bits(run_chunks(stage, hidden, chunks_of(len(hidden), 63)), wanted)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kv_type", KvType)
def test_same_bits_one_token_at_a_time(kv_type: KvType, threads: int) -> None:
    """Decoding over more than 512 positions divides spans among threads."""
    latent = Latent(16, 48, 32, kv_type)
    hidden = latent.hidden(1060)
    chunks = [*chunks_of(500, 250), *(range(i, i + 1) for i in range(500, 530)), range(530, 1030)]
    chunks += [*(range(i, i + 1) for i in range(1030, 1036)), range(1036, 1060)]
    with latent.stage(partial(all_threads, threads)) as stage:
        wanted = run_chunks(stage, hidden, [range(1060)])
        assert_same_bits(run_chunks(stage, hidden, chunks), wanted)


@pytest.mark.parametrize("chunk", [1, 5, 80])
@pytest.mark.parametrize("kv_type", KvType)
def test_what_memory_held_before_and_later_tokens_do_not_matter(kv_type: KvType, chunk: int) -> None:
    latent = Latent(4, 40, 32, kv_type)
    hidden = latent.hidden(80)
    with latent.stage(partial(all_threads, 2)) as stage:
        wanted = run_chunks(stage, hidden, [range(80)])
    for stale in (np.nan, np.inf, -np.inf):
        broken = hidden.copy()
        broken[70:] = stale
        with latent.stage(partial(all_threads, 2)) as stage:
            run_chunks(stage, np.full((96, hidden.shape[1]), stale, np.float32), [range(96)])
            assert_same_bits(run_chunks(stage, hidden, chunks_of(80, chunk)), wanted)
            assert_same_bits(run_chunks(stage, broken, chunks_of(80, chunk))[:70], wanted[:70])


def test_same_bits_beside_other_sequences() -> None:
    latent = Latent(6, 40, 24)
    parts = [latent.hidden(rows, seed) for seed, rows in enumerate((1, 33, 600))]
    tables = [[4], [7, 2, 9], [*range(20, 60)]]
    with latent.stage(partial(all_threads, 2)) as stage:
        wanted = [run_chunks(stage, rows, [range(len(rows))], table) for rows, table in zip(parts, tables, strict=True)]
        batch = [([0] * len(rows), range(len(rows)), table) for rows, table in zip(parts, tables, strict=True)]
        together = stage.run(batch_of(batch, outputs=[]), np.concatenate(parts))
        assert_same_bits(together, np.concatenate(wanted))


@pytest.mark.parametrize("kv_type", KvType)
def test_keys_are_stored_once(kv_type: KvType) -> None:
    """A position takes 576 channels and their scales, also in the memory that a stage allocates."""
    bytes_of = {KvType.F16: 2 * 576, KvType.Q8_0: 576 + 2 * 18, KvType.INT8: 576 + 2 * 18}
    for key in (2, 7, 40, 576):
        step = Latent(2, key, 2, kv_type).step
        kind = tuple(KvType).index(kv_type)
        assert _native.kv_block_bytes(1, key, kind, latent=True) == KV_BLOCK_TOKENS * step.kv_token_bytes
    latent = Latent(2, 576, 512, kv_type)
    assert latent.step.kv_token_bytes == bytes_of[kv_type]
    with latent.stage(partial(all_threads, 1)) as stage:
        assert stage.kv_bytes == LIMITS.kv_blocks * KV_BLOCK_TOKENS * bytes_of[kv_type]


def test_what_no_kernel_computes_is_refused() -> None:
    program = Latent(2, 40, 32).program
    (step,) = program.kv_layers
    for wrong, what in (
        (replace(step, window=9), "latent attention with a window"),
        (replace(step, out=Buffer("o", 2 * 31)), "odd latent values"),
        (replace(step, out=Buffer("o", 2 * 42)), "odd latent values"),
        (replace(step, k=Buffer("x", 120)), "key and value width"),
    ):
        steps = (*program.steps[:-1], wrong)
        with pytest.raises(ModelFileError, match=what):
            all_threads(1).load(replace(program, steps=steps, out=wrong.out), {}, LIMITS, lambda _: None)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES, ids=lambda kind: kind.name)
def test_products_by_head(tmp_path: Path, kind: QuantType) -> None:
    """Covers one matrix per head in every type, rows that do not fill a tile, and tiles that several threads share."""
    heads, rows, cols = 5, 40, 256
    generator = generator_of(kind)
    x, out = Buffer("x", heads * cols), Buffer("out", heads * rows)
    is_float = kind.info.activation is ActivationFormat.F32
    hidden = [
        normal(generator, count, x.width) if is_float else whole_numbers(generator, count, x.width)
        for count in (1, 2, 9, 40)
    ]
    weights = {"w": Weight(normal(generator, heads, rows, cols), kind)}
    case = Case(
        program_of(x, out, HeadMatMul(x, out, "w", heads)),
        weights,
        [(rows_at(range(len(part))), part) for part in hidden],
    )
    check_conformance(tmp_path, case, EXACT)


@pytest.mark.parametrize("heads", [1, 3])
def test_parts_of_heads_are_taken_and_joined(tmp_path: Path, heads: int) -> None:
    x = Buffer("x", heads * 30)
    a, b, c = Buffer("a", heads * 20), Buffer("b", heads * 7), Buffer("c", heads * 27)
    steps = Slice(x, a, 5, heads), Slice(x, b, 23, heads), Join(b, a, c, heads)
    hidden = [normal(generator_of(heads), rows, x.width) for rows in (1, 2, 40)]
    case = Case(program_of(x, c, *steps), {}, [(rows_at(range(len(part))), part) for part in hidden])
    check_conformance(tmp_path, case, 0.0)
    stage = all_threads(2).load(case.program, {}, LIMITS, lambda _: None)
    parts = hidden[2].reshape(40, heads, 30)
    wanted = np.concatenate([parts[:, :, 23:30], parts[:, :, 5:25]], axis=2).reshape(40, -1)
    np.testing.assert_array_equal(stage.run(case.runs[2][0], hidden[2]), wanted)
    stage.close()
