"""Tests of bidirectional attention, as in encoders: close to the reference, with equal bits alone and in a batch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Batch
from llamaclust.model.architectures.positions import alibi_slopes
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.program import KV_BLOCK_TOKENS, Attention
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import batch_of
from support.arithmetic.conformance_cases import EXACT, Float32, attention_case, generator_of
from support.arithmetic.single_steps import (
    LIMITS,
    Case,
    check_conformance,
    normal,
    program_of,
    run_case,
)


def bidirectional(
    shape: tuple[int, int, int], lengths: list[list[int]], window: int | None = None, *, biased: bool = False
) -> Case:
    """Builds a batch for each list of lengths, of whole sequences in scattered blocks."""
    generator, case = generator_of(shape, lengths), attention_case(*shape, [])
    *copies, step = case.program.steps
    assert isinstance(step, Attention)
    step = replace(step, causal=False, window=window, slopes=alibi_slopes(shape[0]) if biased else None)
    program = program_of(case.program.hidden, case.program.out, *copies, step)
    batches = [whole_sequences(batch, generator) for batch in lengths]
    return Case(
        program,
        case.weights,
        [(batch, 2 * normal(generator, batch.rows, program.hidden.width)) for batch in batches],
    )


def whole_sequences(lengths: list[int], generator: np.random.Generator) -> Batch:
    free = iter(generator.permutation(LIMITS.kv_blocks).tolist())
    tables = [[next(free) for _ in range(-(-length // KV_BLOCK_TOKENS))] for length in lengths]
    return batch_of([([0] * n, range(n), table) for n, table in zip(lengths, tables, strict=True)], outputs=[])


LENGTHS = [[1], [2, 17], [33, 1, 50, 16], [160]]


@pytest.mark.parametrize("shape", [(1, 1, 16), (4, 4, 32), (8, 2, 32), (3, 3, 64), (34, 2, 8)])
@pytest.mark.parametrize("window", [None, 1, 64])
def test_as_the_reference_has_it(tmp_path: Path, shape: tuple[int, int, int], window: int | None) -> None:
    check_conformance(tmp_path, bidirectional(shape, LENGTHS, window), EXACT)


@pytest.mark.parametrize("window", [None, 20])
def test_a_bias_by_distance(tmp_path: Path, window: int | None) -> None:
    check_conformance(tmp_path, bidirectional((6, 3, 16), LENGTHS, window, biased=True), EXACT)


@pytest.mark.parametrize(("window", "biased"), [(None, False), (None, True), (600, False), (128, True)])
def test_over_several_spans(tmp_path: Path, window: int | None, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows attend to whole spans after their own; a window ends in a later span than it begins."""
    limits = replace(LIMITS, max_batch_tokens=1200, max_outputs=1200)
    monkeypatch.setattr("support.arithmetic.single_steps.LIMITS", limits)
    check_conformance(tmp_path, bidirectional((2, 1, 16), [[511, 600], [1100]], window, biased=biased), EXACT)


@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_alone_and_in_company(tmp_path: Path, threads: int) -> None:
    """The batch has longer sequences and short ones, which are one unit of work per head."""
    lengths = [33, 1, 5, 90]
    case = bidirectional((4, 2, 32), [lengths])
    ((_, hidden),) = case.runs
    assert hidden is not None
    together = outputs(tmp_path, case, threads)
    ends = np.cumsum([0, *lengths])
    for begin, end in itertools.pairwise(ends.tolist()):
        alone = whole_sequences([end - begin], np.random.default_rng(end))
        found = outputs(tmp_path, replace(case, runs=[(alone, hidden[begin:end])]), threads)
        np.testing.assert_array_equal(found.view(np.uint32), together[begin:end].view(np.uint32))


def outputs(folder: Path, case: Case, threads: int) -> Float32:
    path = folder / "weights.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in case.weights.items()])
    (rows,) = run_case(all_threads(threads), case, open_model(path).tensors)
    return rows
