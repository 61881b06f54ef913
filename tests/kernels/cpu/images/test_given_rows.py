"""Tests of given rows, which replace token embeddings or are added to the hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Batch, Float32, GivenRows
from llamaclust.model import program as ir
from llamaclust.model.loader import Model
from support.arithmetic.backends import BACKENDS
from support.arithmetic.batches import LIMITS as MODEL_LIMITS
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.conformance_cases import generator_of
from support.arithmetic.single_steps import LIMITS, normal, program_of
from support.models.tiny_architectures import MODELS, VOCABULARY, build_architecture

WIDTH, LEVELS = 96, 3
X, OUT, NEXT = (ir.Buffer(name, WIDTH) for name in ("x", "out", "next"))
SEQUENCES = [([0] * 9, range(9), [0]), ([0] * 80, range(30, 110), range(1, 8))]


def given(batch: Batch, rows: Sequence[int], values: Float32) -> Batch:
    return replace(batch, given=GivenRows(np.array(rows, np.int32), values))


def run(name: str, batch: Batch, hidden: Float32, *steps: ir.Step) -> Float32:
    program = program_of(X, steps[-1].out, *steps)
    stage = BACKENDS[name]().load(program, {}, LIMITS, lambda done_bytes: None)
    out = stage.run(batch, hidden).copy()
    stage.close()
    return out


@pytest.mark.parametrize("rows", [[], [0], [3], [8, 9], [2, 3, 4, 60, 88], range(89)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_given_rows_stand_in_place_of_others(name: str, rows: Sequence[int]) -> None:
    """The first step replaces rows by one level, the second adds another level in place; two sequences have few or many
    given rows."""
    generator, batch = generator_of(rows), batch_of(SEQUENCES)
    hidden, values = normal(generator, batch.rows, WIDTH), normal(generator, max(len(rows), 1), LEVELS * WIDTH)
    values = values[: len(rows)]
    wanted = hidden.copy()
    wanted[list(rows)] = values[:, WIDTH : 2 * WIDTH] + values[:, 2 * WIDTH :]
    steps = ir.GivenRows(X, OUT, 1), ir.GivenRows(OUT, OUT, 2, adds=True)
    found = run(name, given(batch, rows, values), hidden, *steps)
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
    np.testing.assert_array_equal(run(name, batch, hidden, *steps), hidden)


@pytest.mark.parametrize("count", [1, 3, 4, 5])
@pytest.mark.parametrize("name", BACKENDS)
def test_few_rows_of_which_each_thread_has_a_copy(name: str, count: int) -> None:
    generator, batch = generator_of(count), batch_of([([0] * count, range(count), [0])])
    hidden, values = normal(generator, count, WIDTH), normal(generator, 1, WIDTH)
    steps = ir.GivenRows(X, X), ir.Add(X, X, OUT), ir.GivenRows(OUT, NEXT, adds=True)
    wanted = np.array(hidden)
    wanted[count - 1] = values
    wanted = wanted + wanted
    wanted[count - 1] += values[0]
    found = run(name, given(batch, [count - 1], values), hidden, *steps)
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize(
    ("rows", "width", "reason"),
    [
        ([0, 0], LEVELS * WIDTH, r"given row is 0, outside \[1, 89\)"),
        ([3, 2], LEVELS * WIDTH, r"given row is 2, outside \[4, 89\)"),
        ([-1], LEVELS * WIDTH, r"given row is -1, outside \[0, 89\)"),
        ([89], LEVELS * WIDTH, r"given row is 89, outside \[0, 89\)"),
        ([5], WIDTH, "width of given rows is 96, expected 3 or more times 96"),
        ([5], LEVELS * WIDTH + 1, "width of given rows is 289, expected 3 or more times 96"),
    ],
)
def test_given_rows_that_do_not_fit_are_refused(rows: list[int], width: int, reason: str) -> None:
    batch, values = batch_of(SEQUENCES), np.ones((len(rows), width), np.float32)
    with pytest.raises(ValueError, match=reason):
        run("cpu-1-thread", given(batch, rows, values), np.ones((89, WIDTH), np.float32), ir.GivenRows(X, OUT, 2))
    short = replace(batch, given=GivenRows(np.array([1, 2], np.int32), np.ones((1, WIDTH), np.float32)))
    with pytest.raises(ValueError, match="given rows without values"):
        run("cpu-1-thread", short, np.ones((89, WIDTH), np.float32), ir.GivenRows(X, OUT))


@pytest.mark.parametrize("architecture", ["llama-linear", "qwen3vl", "gemma3", "gpt2", "granite"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_embeddings_of_tokens_give_the_bits_of_the_tokens(tmp_path: Path, name: str, architecture: str) -> None:
    """Given rows, like image embeddings, are not scaled, and learned positions are added to them."""
    tokens = generator_of(architecture).integers(1, VOCABULARY, 40).tolist()
    with Model.open(build_architecture(tmp_path / "model.gguf", architecture)) as model:
        program = model.program(0, model.layer_count)
        at = next(at for at, step in enumerate(program.steps) if isinstance(step, ir.GivenRows))
        first = program.steps[at]
        assert isinstance(first, ir.GivenRows)
        limits = replace(MODEL_LIMITS, max_context_tokens=min(1024, MODELS[architecture].context))
        stage = load_stage(BACKENDS[name](), model, limits=limits)
        batch = batch_of([(tokens, range(40), range(3))])
        wanted = stage.run(batch, None).copy()
        embedding = ir.Program(0, 1, 2, program.hidden, first.x, program.steps[:at])
        rows = BACKENDS[name]().load(embedding, model.tensors_for(embedding), LIMITS, lambda done_bytes: None)
        embedded = rows.run(batch, None).copy()
        rows.close()
        levels = np.tile(embedded[7:30], (1, program.given_levels))
        levels[:, embedded.shape[1] :] = 0
        hidden_tokens = [0 if 7 <= at < 30 else token for at, token in enumerate(tokens)]
        image = given(batch_of([(hidden_tokens, range(40), range(3))]), range(7, 30), levels)
        found = stage.run(image, None).copy()
        levels[3, 5] += np.float32(0.5)
        other = stage.run(image, None).copy()
        stage.close()
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
    np.testing.assert_array_equal(other[:10], wanted[:10])
    assert (other[10:] != wanted[10:]).any(axis=1).all()
