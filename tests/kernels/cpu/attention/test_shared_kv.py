"""Tests of attention that reads keys and values stored by another step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.program import Add, Attention, Buffer
from support.arithmetic.backends import all_threads
from support.arithmetic.conformance_cases import attention_case
from support.arithmetic.single_steps import Case, check_conformance, program_of, run_case

CHUNKS = [range(0, 1), range(1, 70), range(70, 71), range(71, 100), range(100, 225), range(225, 230)]


def shared_case(heads: int, head_dim: int) -> tuple[Case, Case]:
    """Builds the sum of two attention steps with different queries. In the first case, the second step reads the first
    one's KV; in the second case, it stores the same KV again as another layer."""
    plain = attention_case(heads, 2, head_dim, CHUNKS)
    *copies, first = plain.program.steps
    assert isinstance(first, Attention)
    other = Buffer("other", first.out.width)
    second = replace(first, q=first.out, out=other, shares_kv=True)
    both = [
        Case(
            program_of(plain.program.hidden, other, *copies, first, step, Add(other, first.out, other)),
            plain.weights,
            plain.runs,
        )
        for step in (second, replace(second, layer=2, shares_kv=False))
    ]
    return both[0], both[1]


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (8, 32), (4, 512)])
def test_shared_keys_and_values_are_those_of_the_first_step(tmp_path: Path, heads: int, head_dim: int) -> None:
    shared, stored = shared_case(heads, head_dim)
    check_conformance(tmp_path, shared, 1e-11)
    tensors = open_model(tmp_path / "weights.gguf").tensors
    for found, wanted in zip(*(run_case(all_threads(2), case, tensors) for case in (shared, stored)), strict=True):
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


def test_keys_and_values_of_another_worker_are_refused(tmp_path: Path) -> None:
    plain = attention_case(2, 2, 16, CHUNKS)
    *copies, step = plain.program.steps
    assert isinstance(step, Attention)
    steps = (*copies, replace(step, shares_kv=True))
    write_gguf(tmp_path / "weights.gguf", {}, [weight.source(name) for name, weight in plain.weights.items()])
    tensors = open_model(tmp_path / "weights.gguf").tensors
    with pytest.raises(ModelFileError, match="keys and values of layer 1 are on another worker"):
        run_case(all_threads(1), replace(plain, program=replace(plain.program, steps=steps)), tensors)
