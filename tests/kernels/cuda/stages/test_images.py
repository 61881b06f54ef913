"""Checks that microbatches with images, and image encoders, give the CPU's bits on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Batch, Float32, GivenRows, Int32
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import (
    Activate,
    Add,
    Attention,
    Buffer,
    LayerNorm,
    MatMul,
    MeanRows,
    MergeRows,
    Program,
    Rope,
    RopeTable,
    Step,
)
from llamaclust.model.program import (
    GivenRows as Given,
)
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.options import ActivationFunction, RopeStyle
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.conformance_cases import generator_of
from support.arithmetic.single_steps import Weight, normal
from support.cuda.stages import Open, random_tokens, same

LIMITS = StageLimits(max_batch_tokens=60, max_outputs=60, max_sequences=4, max_context_tokens=1100, kv_blocks=80)
TOKENS, IMAGES = 70, (range(5, 29), range(29, 31), range(40, 64))
BORDERS = (0, 3, 31, 40, 64, 65, 66, TOKENS)
OTHER_BORDERS = (0, 5, 29, 39, 64, TOKENS)


def image_batch(tokens: Sequence[int], start: int, end: int, levels: Float32, *, groups: bool, placed: bool) -> Batch:
    batch = batch_of([(tokens[start:end], range(start, end), range(5))])
    inside = [at for at in range(start, end) if any(at in image for image in IMAGES)]
    rows = np.array(inside, np.int32) - np.int32(start)
    batch = replace(batch, given=GivenRows(rows, np.ascontiguousarray(levels[inside])) if inside else None)
    if groups:
        batch = replace(batch, groups=groups_of(range(start, end), IMAGES))
    if placed:
        places = np.stack([np.arange(start, end) // part for part in (1, 2, 3, 1)])
        batch = replace(batch, rope_positions=places.astype(np.int32))
    return batch


def groups_of(positions: range, images: Sequence[range]) -> Int32:
    around = (next((image for image in images if at in image), range(at, at + 1)) for at in positions)
    return np.array([(group.start, group.stop) for group in around], np.int32)


def logits(
    backend: Backend, model: Model, levels: Float32, borders: Sequence[int], *, groups: bool, placed: bool, cut: int = 0
) -> Float32:
    tokens, found = random_tokens(model, TOKENS), []
    ends = (0, cut, model.layer_count) if cut else (0, model.layer_count)
    stages = [load_stage(backend, model, first, end, LIMITS) for first, end in pairwise(ends)]
    for start, end in pairwise(borders):
        batch, hidden = image_batch(tokens, start, end, levels, groups=groups, placed=placed), None
        for stage in stages:
            hidden = stage.run(batch, hidden)
        assert hidden is not None
        found.append(hidden.copy())
    for stage in stages:
        stage.close()
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("name", "groups", "placed", "cut"),
    [
        ("gemma3", True, False, 0),
        ("gemma3", True, False, 2),
        ("llama", False, False, 0),
        ("qwen3vl", False, True, 0),
        ("qwen3vl", True, True, 2),
        ("qwen3vlmoe", False, True, 1),
        ("gemma2", True, False, 0),
        ("gpt-oss", True, False, 0),
        ("gemma4", True, False, 0),
    ],
)
def test_images_in_prompts(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, name: str, groups: bool, placed: bool, cut: int
) -> None:
    """Covers chunks with and without images, and then two single tokens, so that the second one is captured."""
    model = opened(name)
    width, count = model.program(0, 1).given_width, model.program(0, model.layer_count).given_levels
    levels = normal(generator_of(name, cut), TOKENS, count * width)
    wanted = logits(cpu, model, levels, OTHER_BORDERS, groups=groups, placed=placed)
    for _ in range(2):
        same(logits(cuda, model, levels, BORDERS, groups=groups, placed=placed, cut=cut), wanted)
    plain = logits(cuda, model, levels, BORDERS, groups=False, placed=False)
    assert (plain[64:] != wanted[64:]).any() == (groups or placed)


@pytest.mark.parametrize("kv_type", KvType)
def test_groups_over_spans(tmp_path: Path, cpu: CpuBackend, cuda: CudaBackend, kv_type: KvType) -> None:
    """Covers image groups that cross a border of spans of 512 positions, with windows, in batches of two sequences."""
    width, key_width = 4 * 32, 2 * 32
    x = Buffer("x", width + 2 * key_width)
    q, k, v, out = Buffer("q", width), Buffer("k", key_width), Buffer("v", key_width), Buffer("out", width)
    eye = np.eye(x.width, dtype=np.float32)
    weights = {"wq": Weight(eye[:width]), "wk": Weight(eye[width : width + key_width]), "wv": Weight(eye[-key_width:])}
    tensors = tensors_of(tmp_path, weights)
    products = MatMul(x, q, "wq"), MatMul(x, k, "wk"), MatMul(x, v, "wv")
    images = [range(500, 530), range(1000, 1030)]
    generator, limits = (
        generator_of(kv_type),
        replace(LIMITS, max_batch_tokens=64, max_outputs=64, kv_type=str(kv_type)),
    )
    hidden = 2 * normal(generator, 1040, x.width)
    for changes in ({}, {"window": 100}, {"soft_cap": 5.0}, {"slopes": (0.5, 0.25, 0.125, 0.0625)}):
        attention = Attention(q, k, v, out, 1, 4, 2, 32, scale=32**-0.5, kv_type=kv_type, **changes)
        program = Program(1, 2, 3, x, out, (*products, attention))
        found = [run_grouped(backend, program, tensors, limits, hidden, images) for backend in (cuda, cpu)]
        same(*found)


def run_grouped(
    backend: Backend,
    program: Program,
    tensors: Mapping[str, Tensor],
    limits: StageLimits,
    hidden: Float32,
    images: Sequence[range],
) -> Float32:
    stage, found = backend.load(program, dict(tensors), limits, lambda _: None), []
    borders = [*range(0, 501, 50), 530, *range(580, 1000, 60), 1000, 1035, 1036, 1040]
    for start, end in pairwise(borders):
        batch = batch_of([([0] * (end - start), range(start, end), range(70)), ([0] * 4, range(4), range(70, 71))])
        own = np.concatenate([groups_of(range(start, end), images), groups_of(range(4), [range(1, 4)])])
        rows = np.concatenate([hidden[start:end], hidden[:4]])
        found.append(stage.run(replace(batch, groups=own), rows).copy())
    stage.close()
    return np.concatenate(found)


def tensors_of(folder: Path, weights: Mapping[str, Weight]) -> Mapping[str, Tensor]:
    write_gguf(folder / "w.gguf", {}, [weight.source(name) for name, weight in weights.items()])
    return open_model(folder / "w.gguf").tensors


HEADS, HEAD_DIM, WIDTH = 4, 16, 64


def encoder_layer(layer: int, x: Buffer, *, grouped: bool) -> list[Step]:
    q, k, v, out, inner, normed = (Buffer(name, WIDTH) for name in ("q", "k", "v", "attended", "inner", "normed"))
    sections = (*[0] * (HEAD_DIM // 4), *[1] * (HEAD_DIM // 4))
    table = RopeTable(tuple(100.0 ** (-i % 4 / 4) for i in range(HEAD_DIM // 2)))
    return [
        LayerNorm(x, normed, f"{layer}.norm", None, 1e-6),
        *(MatMul(normed, part, f"{layer}.{part.name}", f"{layer}.bias") for part in (q, k, v)),
        *(Rope(part, HEADS, HEAD_DIM, RopeStyle.NEOX, table, sections) for part in (q, k)),
        Attention(q, k, v, out, layer, HEADS, HEADS, HEAD_DIM, scale=0.25, causal=False, grouped=grouped),
        MatMul(out, inner, f"{layer}.o"),
        Activate(inner, inner, ActivationFunction.GELU_QUICK),
        Add(x, inner, x),
    ]


@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.Q8_0])
def test_an_encoder_of_images(tmp_path: Path, cpu: CpuBackend, cuda: CudaBackend, quant_type: QuantType) -> None:
    """Covers attention in windows and over whole images, rotation by height and width, merges and means."""
    generator = generator_of(quant_type)
    patches, x, kept = Buffer("patches", 96), Buffer("x", WIDTH), Buffer("kept", WIDTH)
    wide, mean, out = Buffer("wide", 4 * WIDTH), Buffer("mean", 4 * WIDTH), Buffer("out", 48)
    weights = {"patch": Weight(normal(generator, WIDTH, 96), quant_type)}
    for layer in (1, 2):
        weights |= {
            f"{layer}.{name}": Weight(normal(generator, WIDTH, WIDTH) / np.float32(8), quant_type) for name in "qkvo"
        }
        weights |= {f"{layer}.{name}": Weight(normal(generator, WIDTH)) for name in ("norm", "bias")}
    weights["merge"] = Weight(normal(generator, 48, 4 * WIDTH), quant_type)
    steps = (
        MatMul(patches, x, "patch"),
        *encoder_layer(1, x, grouped=True),
        *encoder_layer(2, x, grouped=False),
        Given(x, kept),
        MergeRows(kept, wide, 4),
        MeanRows(wide, mean, 2),
        MatMul(mean, out, "merge"),
    )
    program, tensors = Program(1, 3, 4, patches, out, steps), tensors_of(tmp_path, weights)
    stages = [backend.load(program, dict(tensors), LIMITS, lambda _: None) for backend in (cuda, cpu)]
    for counts in ((8, 16), (24, 32), (8, 8), (16, 8)):
        windows = [[range(at, min(at + 6, count)) for at in range(0, count, 6)] for count in counts]
        batch = batch_of([([0] * count, range(count), range(10 * at, 10 * at + 3)) for at, count in enumerate(counts)])
        places = generator.integers(0, 30, (2, batch.rows)).astype(np.int32)
        groups = np.concatenate([groups_of(range(count), own) for count, own in zip(counts, windows, strict=True)])
        batch = replace(batch, rope_positions=places, groups=groups)
        hidden = normal(generator, batch.rows, 96)
        found, wanted = (stage.run(batch, hidden).copy() for stage in stages)
        assert found.shape == (batch.rows // 8, 48)
        same(found, wanted)
    for stage in stages:
        stage.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"groups": np.array([[0, 1], [1, 4], [1, 3]], np.int32)}, r"position 2 is \[1, 3\), expected \[1, 4\)"),
        ({"groups": np.array([[0, 1], [1, 4], [1, 4]], np.int32)}, "end of a group is 4, expected 3"),
        ({"groups": np.zeros((3, 3), np.int32)}, r"shape of groups is \[3, 3\]"),
        ({"rope_positions": np.zeros((2, 3), np.int32)}, r"shape of rope positions is \[2, 3\]"),
        ({"rope_positions": np.full((3, 3), 1100, np.int32)}, "rope position is 1100"),
        ({"given": GivenRows(np.array([1, 1], np.int32), np.zeros((2, 192), np.float32))}, "given row is 1"),
        ({"given": GivenRows(np.array([3], np.int32), np.zeros((1, 192), np.float32))}, "given row is 3"),
        (
            {"given": GivenRows(np.array([0], np.int32), np.zeros((1, 150), np.float32))},
            r"shape of given rows is \[1, 150\]",
        ),
        (
            {"given": GivenRows(np.array([0], np.int32), np.zeros((2, 192), np.float32))},
            r"shape of given rows is \[2, 192\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(opened: Open, cuda: CudaBackend, change: dict[str, object], reason: str) -> None:
    model = opened("qwen3vl")
    assert model.program(0, 1).given_width == 64
    stage = load_stage(cuda, model, limits=LIMITS)
    batch = replace(batch_of([([5, 6, 7], range(3), [0])]), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=reason):
        stage.run(batch, None)
    stage.close()


def test_groups_with_latent_attention_are_refused(opened: Open, cuda: CudaBackend) -> None:
    stage = load_stage(cuda, opened("deepseek2"), limits=LIMITS)
    batch = batch_of([([5, 6, 7], range(3), [0])])
    with pytest.raises(ValueError, match="GPUs support no groups"):
        stage.run(replace(batch, groups=groups_of(range(3), [range(1, 3)])), None)
    stage.close()
