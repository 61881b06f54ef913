"""Tests of loading by the CPU backend: progress, sharing, and rejected files and programs."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import InsufficientMemoryError, ModelFileError, UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels import _native
from llamaclust.kernels._native import PackedMatrix
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import FileIdentity, Tensor
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import (
    KV_BLOCK_TOKENS,
    Add,
    Attention,
    Buffer,
    Embed,
    MatMul,
    Moe,
    PositionScale,
    RmsNorm,
    Rope,
    RopeTable,
    SelectRows,
    Step,
)
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.options import ExpertOptions, RopeStyle
from support.arithmetic.batches import batch_of
from support.arithmetic.single_steps import LIMITS, Weight, normal, program_of, rows_at

X, Y, OUT = Buffer("x", 256), Buffer("y", 64), Buffer("out", 256)


def tensors_of(folder: Path, **weights: Weight) -> dict[str, Tensor]:
    path = folder / "weights.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in weights.items()])
    return dict(open_model(path).tensors)


def random_weight(*shape: int, kind: QuantType = QuantType.F32) -> Weight:
    return Weight(normal(np.random.default_rng(len(shape)), *shape), kind)


def load(
    steps: Sequence[Step],
    tensors: dict[str, Tensor],
    out: Buffer = OUT,
    limits: StageLimits = LIMITS,
    first: bool = False,
) -> CpuStage:
    program = program_of(X, out, *steps, first=first)
    return CpuBackend(1).load(program, tensors, limits, lambda done_bytes: None)


def test_progress_covers_every_byte_once(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path, w=random_weight(9000, 256, kind=QuantType.Q8_0), n=random_weight(256))
    done: list[int] = []
    steps: list[Step] = [RmsNorm(X, OUT, "n", 1e-5), MatMul(OUT, Buffer("big", 9000), "w")]
    program = program_of(X, Buffer("big", 9000), *steps)
    backend = CpuBackend(2)
    stage = backend.load(program, tensors, LIMITS, done.append)
    assert sum(done) == stage.weight_bytes == sum(tensor.resident_bytes for tensor in tensors.values())
    again: list[int] = []
    other = backend.load(program, tensors, LIMITS, again.append)
    assert sum(again) == sum(done)
    stage.close()
    other.close()


def test_stages_share_weights_as_long_as_one_lives(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path, w=random_weight(256, 256))
    backend = CpuBackend(1)
    program = program_of(X, OUT, MatMul(X, OUT, "w"))
    first = backend.load(program, tensors, LIMITS, lambda done_bytes: None)
    hidden = normal(np.random.default_rng(2), 3, 256)
    wanted = first.run(rows_at(range(3)), hidden).copy()
    second = backend.load(program, tensors, LIMITS, lambda done_bytes: None)
    assert first.weights["w"] is second.weights["w"]
    first.close()
    os.truncate(tensors["w"].path, 64)
    np.testing.assert_array_equal(second.run(rows_at(range(3)), hidden), wanted)
    third = backend.load(program, tensors, LIMITS, lambda done_bytes: None)
    second.close()
    third.close()
    del first, second, third
    gc.collect()
    with pytest.raises(ModelFileError, match="shrank"):
        backend.load(program, tensors, LIMITS, lambda done_bytes: None)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES, ids=lambda kind: kind.name)
def test_plans_know_what_tiles_take(kind: QuantType) -> None:
    for rows in (1, 16, 17, 40):
        for segments in (1, 2, 3, 4, 7, 18):
            cols = segments * kind.info.block_size
            tensor = Tensor("w", kind, (3, rows, cols), Path(), 0, 0, FileIdentity(0, 0, 0, 0))
            assert tensor.resident_bytes == 3 * PackedMatrix(int(kind), rows, cols).bytes, (rows, cols)


@pytest.mark.parametrize("kv_type", KvType)
def test_plans_know_what_keys_and_values_take(kv_type: KvType) -> None:
    """Covers head sizes that values or scales do not fill, and the bytes that a stage allocates."""
    for dim in range(1, 513):
        x, out = Buffer("x", 2 * dim), Buffer("out", 2 * dim)
        step = Attention(x, x, x, out, 0, heads=2, kv_heads=2, head_dim=dim, scale=1.0, kv_type=kv_type)
        kind = tuple(KvType).index(step.kv_type)
        assert _native.kv_block_bytes(step.kv_heads, step.head_dim, kind) == KV_BLOCK_TOKENS * step.kv_token_bytes, dim
        if dim not in (40, 80, 100, 128):
            continue
        program = program_of(x, out, step)
        stage = CpuBackend(1).load(program, {}, LIMITS, lambda done_bytes: None)
        assert stage.kv_bytes == LIMITS.kv_blocks * KV_BLOCK_TOKENS * step.kv_token_bytes, dim
        stage.close()


@pytest.mark.parametrize("kind", [QuantType.F16, QuantType.BF16])
def test_vectors_of_half_floats(tmp_path: Path, kind: QuantType) -> None:
    values = np.arange(256, dtype=np.float32) / np.float32(8) - np.float32(16)
    tensors = tensors_of(tmp_path, n=Weight(values, kind))
    stage = load([RmsNorm(X, OUT, "n", 0.0)], tensors)
    found = stage.run(rows_at(range(1)), np.ones((1, 256), np.float32))
    np.testing.assert_array_equal(found[0], values)


@pytest.mark.parametrize(
    ("steps", "weights", "names"),
    [
        ([MatMul(X, OUT, "w")], {"w": random_weight(256, 128)}, ["w", "128"]),
        ([MatMul(X, OUT, "w")], {"w": random_weight(255, 256)}, ["w", "255"]),
        ([MatMul(X, OUT, "w")], {"w": random_weight(2, 256, 256)}, ["w"]),
        ([MatMul(X, OUT, "w", "b")], {"w": random_weight(256, 256), "b": random_weight(255)}, ["b", "255"]),
        ([RmsNorm(X, OUT, "n", 1e-5)], {"n": random_weight(64)}, ["n", "64"]),
    ],
)
def test_shapes_that_are_refused(
    tmp_path: Path, steps: list[Step], weights: dict[str, Weight], names: list[str]
) -> None:
    with pytest.raises(ModelFileError) as refused:
        load(steps, tensors_of(tmp_path, **weights))
    assert all(name in str(refused.value) for name in [*names, str(tmp_path)])


@pytest.mark.parametrize("kind", [QuantType.NVFP4, QuantType.F64, QuantType.Q1_0, QuantType.Q8_K])
def test_types_that_are_refused(tmp_path: Path, kind: QuantType) -> None:
    tensors = tensors_of(tmp_path, weight=random_weight(256, 256), norm=random_weight(256))
    for name, step in (("weight", MatMul(X, OUT, "weight")), ("norm", RmsNorm(X, OUT, "norm", 1e-5))):
        changed = {**tensors, name: replace(tensors[name], quant_type=kind)}
        with pytest.raises(ModelFileError, match=rf"weights\.gguf: tensor {name}: type {kind.name}"):
            load([step], changed)


def test_a_norm_of_blocks_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path, norm=random_weight(256, kind=QuantType.Q8_0))
    with pytest.raises(ModelFileError, match="norm: type Q8_0"):
        load([RmsNorm(X, OUT, "norm", 1e-5)], tensors)


def attention(q: int = 256, kv: int = 64, heads: int = 8, kv_heads: int = 2, dim: int = 32) -> list[Step]:
    buffers = (Buffer("q", q), Buffer("k", kv), Buffer("v", kv))
    steps: list[Step] = [MatMul(X, buffer, f"w{buffer.width}") for buffer in buffers]
    return [*steps, Attention(*buffers, OUT, 1, heads, kv_heads, dim, 1.0)]


TABLE = RopeTable((1.0,) * 17)


@pytest.mark.parametrize(
    "steps",
    [
        attention(heads=7, kv_heads=2),
        attention(heads=0),
        attention(kv_heads=0),
        attention(heads=8, kv_heads=2, dim=31),
        attention(heads=-8, kv_heads=-2),
        attention(heads=2**31),
        [Rope(X, 8, 32, RopeStyle.NORM, TABLE)],
        [Rope(X, 7, 32, RopeStyle.NORM, RopeTable((1.0,)))],
        [Rope(X, 8, 32, RopeStyle.NORM, RopeTable(()))],
        [Rope(X, 8, 32, RopeStyle.NORM, RopeTable((float("nan"),)))],
        [Rope(X, 8, 32, RopeStyle.NORM, RopeTable((1e9,)))],
        [RmsNorm(X, OUT, "n", float("nan"))],
        [RmsNorm(X, OUT, "n", -1.0)],
        [RmsNorm(X, Y, "n", 1e-5)],
        [Add(X, Y, OUT), MatMul(X, Y, "w64")],
        [SelectRows(X, Y)],
        [Moe(X, OUT, "router", "gate", "up", "down", experts=4, used=5, ffn_width=64)],
        [Moe(X, OUT, "router", "gate", "up", "down", experts=4, used=0, ffn_width=64)],
        [Moe(X, OUT, "router", "gate", "up", "down", experts=4, used=2, ffn_width=64, options=ExpertOptions(groups=3))],
        [Moe(X, OUT, "router", "gate", "up", "down", experts=4, used=2, ffn_width=64, options=ExpertOptions(groups=0))],
        [Moe(X, OUT, "router", "gate", "up", "down", experts=4, used=2, ffn_width=64, options=ExpertOptions(groups=4))],
        [
            Moe(
                X,
                OUT,
                "router",
                "gate",
                "up",
                "down",
                experts=4,
                used=2,
                ffn_width=64,
                options=ExpertOptions(groups=2, used_groups=3),
            )
        ],
        [
            Moe(
                X,
                OUT,
                "router",
                "gate",
                "up",
                "down",
                experts=4,
                used=2,
                ffn_width=64,
                options=ExpertOptions(scale=float("nan")),
            )
        ],
        [Moe(X, OUT, "router", "gate", "up", "down", experts=4, used=2, ffn_width=64, selection_bias="n")],
        [Moe(X, OUT, "router", "gate", "up", "down", experts=4, used=2, ffn_width=64, gate_bias="w64")],
        [PositionScale(X, OUT, float("inf"), 4)],
        [PositionScale(X, OUT, 1.0, 0)],
        [PositionScale(X, OUT, 1.0, 4, -1)],
    ],
)
def test_figures_that_do_not_hold_together(tmp_path: Path, steps: list[Step]) -> None:
    """A file's header may have any numbers; they must not cause accesses to invalid memory."""
    tensors = tensors_of(
        tmp_path,
        w256=random_weight(256, 256),
        w64=random_weight(64, 256),
        n=random_weight(256),
        router=random_weight(4, 256),
        gate=random_weight(4, 64, 256),
        up=random_weight(4, 64, 256),
        down=random_weight(4, 256, 64),
    )
    with pytest.raises((ModelFileError, KeyError)):
        load(steps, tensors, out=steps[-1].x if isinstance(steps[-1], Rope) else OUT)


def test_a_good_program_of_the_same_kind(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path, w256=random_weight(256, 256), w64=random_weight(64, 256))
    stage = load(attention(), tensors)
    assert stage.run(rows_at(range(2)), np.ones((2, 256), np.float32)).shape == (2, 256)
    stage.close()


def test_token_ids_are_below_the_rows_of_the_embedding(tmp_path: Path) -> None:
    stage = load([Embed(OUT, "e")], tensors_of(tmp_path, e=random_weight(40, 256)), first=True)
    assert stage.run(batch_of([([39], [0], [0])]), None).shape == (1, 256)
    with pytest.raises(ValueError, match="token"):
        stage.run(batch_of([([40], [0], [0])]), None)


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path, w256=random_weight(256, 256), w64=random_weight(64, 256))
    with pytest.raises(InsufficientMemoryError, match="MiB"):
        load(attention(), tensors, limits=replace(LIMITS, kv_blocks=1 << 26, max_context_tokens=1 << 20))


def test_levels_and_threads_that_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'sse9'.*generic"):
        CpuBackend(1, "sse9")
    for threads in (0, -1, 5000):
        with pytest.raises(UsageError, match=str(threads)):
            CpuBackend(threads)
