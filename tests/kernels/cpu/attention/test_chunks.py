"""Tests of chunked attention: the reference's results, and equal bits in any batches and on any threads."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels.reference.attention import seen_by
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention
from support.arithmetic.backends import all_threads
from support.arithmetic.conformance_cases import EXACT, attention_case
from support.arithmetic.single_steps import Case, check_conformance, error, program_of, rows_at, run_case

HEADS, KV_HEADS, HEAD_DIM = 6, 3, 16
BOUNDS = [0, 150, 300, 450, 511, 512, 513, 600, 700, 800]


def chunked(case: Case, chunk: int, **changes: object) -> Case:
    *copies, step = case.program.steps
    assert isinstance(step, Attention)
    changed = replace(step, window=chunk, chunked=True, **changes)  # type: ignore[arg-type]
    return Case(program_of(case.program.hidden, case.program.out, *copies, changed), case.weights, case.runs)


def step_of(case: Case) -> Attention:
    step = case.program.steps[-1]
    assert isinstance(step, Attention)
    return step


@pytest.mark.parametrize("chunk", [1, 6, 100, 512, 520, 1 << 20])
def test_as_the_reference_has_it(tmp_path: Path, chunk: int) -> None:
    """Chunks end within a span, at its end, and in a later span."""
    case = attention_case(HEADS, KV_HEADS, HEAD_DIM, [range(start, end) for start, end in pairwise(BOUNDS)])
    check_conformance(tmp_path, chunked(case, chunk), EXACT)


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("chunk", [70, 512, 700])
def test_same_bits_in_any_batches(tmp_path: Path, kv_type: KvType, chunk: int) -> None:
    case = chunked(attention_case(HEADS, KV_HEADS, HEAD_DIM, [range(800)]), chunk, kv_type=kv_type)
    path = tmp_path / "weights.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in case.weights.items()])
    tensors = open_model(path).tensors
    ((_, hidden),) = case.runs
    assert hidden is not None

    def run(threads: int, bounds: list[int]) -> NDArray[np.float32]:
        runs = [(rows_at(range(start, end)), hidden[start:end]) for start, end in pairwise(bounds)]
        return np.concatenate(run_case(all_threads(threads), Case(case.program, case.weights, runs), tensors))

    wanted = run(1, [*range(0, 800, 160), 800])
    for threads in (1, 2, 3):
        found = run(threads, [*range(0, 500, 63), *range(505, 520), *range(560, 780, 70), *range(781, 801)])
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), f"{threads} threads")


def test_a_chunk_is_no_window(tmp_path: Path) -> None:
    """The first row of a chunk attends only to itself, the last row to as many positions as with a window."""
    case = attention_case(HEADS, KV_HEADS, HEAD_DIM, [range(40)])
    step = step_of(chunked(case, 8))
    assert [seen_by(step, own, 40) for own in (0, 7, 8, 9, 39)] == [(0, 1), (0, 8), (8, 9), (8, 10), (32, 40)]
    path = tmp_path / "weights.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in case.weights.items()])
    tensors = open_model(path).tensors
    in_window = replace(step_of(case), window=8)
    program = program_of(case.program.hidden, case.program.out, *case.program.steps[:-1], in_window)
    found, windowed = (
        run_case(ReferenceBackend(), made, tensors)[0]
        for made in (chunked(case, 8), Case(program, case.weights, case.runs))
    )
    np.testing.assert_array_equal(found[[7, 15, 39]], windowed[[7, 15, 39]])
    assert error(found[8:15], windowed[8:15]) > 0.05
