"""Tests of attention with sinks: the reference's results, and equal bits in any chunks and on any threads."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention
from support.arithmetic.backends import all_threads
from support.arithmetic.conformance_cases import EXACT, attention_case
from support.arithmetic.single_steps import Case, Weight, check_conformance, error, program_of, rows_at, run_case

HEADS, SINKS = 6, Weight(np.array([2.0, -3.0, 0.5, 6.0, -50.0, 1.0], np.float32))
BOUNDS = [0, 150, 300, 450, 511, 512, 513, 600]


def with_sinks(case: Case, **changes: object) -> Case:
    *copies, step = case.program.steps
    assert isinstance(step, Attention)
    changed = replace(step, sinks="sinks", **changes)  # type: ignore[arg-type]
    program = program_of(case.program.hidden, case.program.out, *copies, changed)
    return Case(program, {**case.weights, "sinks": SINKS}, case.runs)


@pytest.mark.parametrize(("cap", "window"), [(None, None), (2.0, 520), (None, 6)])
def test_as_the_reference_has_it(tmp_path: Path, cap: float | None, window: int | None) -> None:
    case = attention_case(HEADS, 3, 16, [range(start, end) for start, end in pairwise(BOUNDS)])
    check_conformance(tmp_path, with_sinks(case, soft_cap=cap, window=window), EXACT)


@pytest.mark.parametrize("kv_type", KvType)
def test_same_bits_in_any_chunks(tmp_path: Path, kv_type: KvType) -> None:
    """Covers prefill, and decoding over two spans, which are computed on different threads."""
    case = with_sinks(attention_case(HEADS, 3, 16, [range(600)]), kv_type=kv_type)
    path = tmp_path / "weights.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in case.weights.items()])
    tensors = open_model(path).tensors
    ((_, hidden),) = case.runs
    assert hidden is not None

    def run(threads: int, bounds: list[int]) -> NDArray[np.float32]:
        runs = [(rows_at(range(start, end)), hidden[start:end]) for start, end in pairwise(bounds)]
        return np.concatenate(run_case(all_threads(threads), Case(case.program, case.weights, runs), tensors))

    wanted = run(1, [*range(0, 600, 150), 600])
    for threads in (1, 2, 3):
        found = run(threads, [*range(0, 500, 63), *range(505, 520), 560, 600])
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), f"{threads} threads")


def test_a_sink_takes_its_share(tmp_path: Path) -> None:
    """The reference's result differs without sinks."""
    case = attention_case(HEADS, 3, 16, [range(40)])
    path = tmp_path / "weights.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in with_sinks(case).weights.items()])
    tensors = open_model(path).tensors
    plain, found = (run_case(ReferenceBackend(), made, tensors)[0] for made in (case, with_sinks(case)))
    assert error(found, plain) > 0.05


def test_a_sink_for_each_head(tmp_path: Path) -> None:
    case = with_sinks(attention_case(HEADS, 3, 16, [range(4)]))
    path = tmp_path / "weights.gguf"
    short = {**case.weights, "sinks": Weight(SINKS.values[:-1])}
    write_gguf(path, {}, [weight.source(name) for name, weight in short.items()])
    with pytest.raises(ModelFileError, match=r"tensor sinks: shape \[5\].*\[6\]"):
        run_case(all_threads(1), case, open_model(path).tensors)
