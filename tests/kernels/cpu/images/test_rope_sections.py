"""Tests of RoPE whose pairs use positions of different sections, as for images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Batch, Float32, Int32
from llamaclust.model.loader import Model
from llamaclust.model.program import Buffer, Program, Rope, RopeTable
from llamaclust.model.steps.options import RopeStyle
from support.arithmetic.backends import BACKENDS
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.conformance_cases import EXACT, generator_of
from support.arithmetic.single_steps import LIMITS, error, normal, program_of, rows_at
from support.models.tiny_architectures import VOCABULARY, build_architecture
from support.models.tiny_model import build_tiny_model

HEADS, HEAD_DIM, PAIRS = 3, 48, 20
FREQUENCIES = tuple(10000.0 ** (-i / PAIRS) for i in range(PAIRS))
SECTIONS = tuple([0, 1, 2, 1, 0] * 4)
X = Buffer("x", HEADS * HEAD_DIM)


def rope(sections: tuple[int, ...] | None, style: RopeStyle = RopeStyle.NEOX) -> Program:
    return program_of(X, X, Rope(X, HEADS, HEAD_DIM, style, RopeTable(FREQUENCIES, 1.25), sections))


def run(name: str, program: Program, batch: Batch, hidden: Float32) -> Float32:
    stage = BACKENDS[name]().load(program, {}, LIMITS, lambda done_bytes: None)
    out = stage.run(batch, hidden).copy()
    stage.close()
    return out


def rotated(hidden: Float32, positions: Int32, style: RopeStyle) -> Float32:
    """Rotates pair i of each row by positions[SECTIONS[i], row] in float64."""
    out = hidden.reshape(-1, HEADS, HEAD_DIM).astype(np.float64)
    for row in range(len(hidden)):
        for i, frequency in enumerate(FREQUENCIES):
            turn = 1.25 * np.exp(1j * float(positions[SECTIONS[i], row]) * frequency)
            a, b = (2 * i, 2 * i + 1) if style is RopeStyle.NORM else (i, i + PAIRS)
            pair = (out[row, :, a] + 1j * out[row, :, b]) * turn
            out[row, :, a], out[row, :, b] = pair.real, pair.imag
    return out.reshape(hidden.shape).astype(np.float32)


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize("rows", [1, 3, 90])
@pytest.mark.parametrize("name", BACKENDS)
def test_each_pair_turns_by_its_section(name: str, rows: int, style: RopeStyle) -> None:
    generator = generator_of(rows, style)
    hidden, positions = normal(generator, rows, X.width), generator.integers(0, 4096, (4, rows), np.int32)
    batch = replace(rows_at(range(7, 7 + rows)), rope_positions=positions)
    found = run(name, rope(SECTIONS, style), batch, hidden)
    assert error(found, rotated(hidden, positions, style)) < EXACT
    first = run("cpu-1-thread", rope(SECTIONS, style), batch, hidden)
    if name != "reference":
        np.testing.assert_array_equal(found.view(np.uint32), first.view(np.uint32))


@pytest.mark.parametrize("name", BACKENDS)
def test_equal_positions_give_the_bits_of_rows_without_sections(name: str) -> None:
    """Sections without rope positions, and rope positions without sections, also give the bits of plain rows."""
    generator = generator_of("equal")
    hidden, plain = normal(generator, 60, X.width), rows_at(range(4000, 4060))
    in_sections = replace(plain, rope_positions=np.tile(plain.positions, (3, 1)))
    elsewhere = replace(plain, rope_positions=np.zeros((3, 60), np.int32))
    wanted = run(name, rope(None), plain, hidden)
    for sections, batch in ((SECTIONS, plain), (SECTIONS, in_sections), (None, elsewhere)):
        np.testing.assert_array_equal(run(name, rope(sections), batch, hidden).view(np.uint32), wanted.view(np.uint32))
    assert (run(name, rope(SECTIONS), elsewhere, hidden) != wanted).any()


@pytest.mark.parametrize("architecture", ["qwen2vl", "qwen3vl", "qwen3vlmoe"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_model_with_sections(tmp_path: Path, name: str, architecture: str) -> None:
    """RoPE joined with attention gives the bits of text for equal positions, and equal bits for an image's positions in
    one batch or several."""
    tokens = generator_of(architecture).integers(1, VOCABULARY, 50).tolist()
    image = np.tile(np.arange(50, dtype=np.int32), (4, 1))
    image[:3, 10:34] = 10 + np.array([np.zeros(24), np.arange(24) // 6, np.arange(24) % 6])
    image[:, 34:] = 16 + np.arange(16)
    path = tmp_path / "model.gguf"
    if architecture == "qwen2vl":
        sections = {"qwen2vl.rope.dimension_sections": np.array([4, 6, 5, 0], np.int32)}
        build_tiny_model(path, architecture=architecture, layers=2, extra=sections)
    else:
        build_architecture(path, architecture)
    with Model.open(path) as model:
        assert model.program(0, model.layer_count).rope_sections == 3
        stage = load_stage(BACKENDS[name](), model)

        def logits(rope_positions: Int32 | None, *borders: int) -> Float32:
            found = []
            for start, end in zip((0, *borders), (*borders, 50), strict=True):
                batch = batch_of([(tokens[start:end], range(start, end), range(4))])
                if rope_positions is not None:
                    positions = np.ascontiguousarray(rope_positions[:, start:end])
                    batch = replace(batch, rope_positions=positions)
                found.append(stage.run(batch, None).copy())
            return np.concatenate(found)

        plain, placed = logits(None), logits(np.tile(np.arange(50, dtype=np.int32), (4, 1)))
        found, cut = logits(image), logits(image, 20, 49)
        stage.close()
    np.testing.assert_array_equal(placed.view(np.uint32), plain.view(np.uint32))
    np.testing.assert_array_equal(cut.view(np.uint32), found.view(np.uint32))
    np.testing.assert_array_equal(found[:10], plain[:10])
    assert (found[12:] != plain[12:]).any(axis=1).all()


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        (np.zeros((2, 5), np.int32), "number of rope positions is 10, expected 3 or more for each of 5 rows"),
        (np.full((3, 5), -1, np.int32), "rope position is -1, outside"),
        (np.full((3, 5), 4096, np.int32), r"rope position is 4096, outside \[0, 4096\)"),
        (np.zeros((3, 4), np.int32), "shape"),
    ],
)
def test_rope_positions_that_do_not_fit_are_refused(positions: Int32, reason: str) -> None:
    batch = replace(rows_at(range(5)), rope_positions=positions)
    with pytest.raises(ValueError, match=reason):
        run("cpu-1-thread", rope(SECTIONS), batch, np.ones((5, X.width), np.float32))
