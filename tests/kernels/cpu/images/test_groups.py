"""Tests of attention within groups of rows: float64 attention with a dense mask, and equal bits in any batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels.backend import Batch, Float32, Int32
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention
from support.arithmetic.backends import BACKENDS, all_threads
from support.arithmetic.batches import batch_of
from support.arithmetic.conformance_cases import EXACT, attention_case, generator_of
from support.arithmetic.single_steps import (
    Case,
    Weight,
    check_conformance,
    error,
    normal,
    program_of,
    rows_at,
    run_case,
)

HEADS, KV_HEADS, HEAD_DIM = 6, 3, 16
IMAGES = [range(20, 120), range(120, 121), range(300, 324), range(500, 530), range(905, 1105)]
"""Adjacent groups, one across a span border at 512 positions, and one with more rows than are computed together."""
BORDERS = [0, 150, 299, 410, 500, 530, 700, 905, 1105, 1110]
"""Batch borders that split no group."""


def groups_at(positions: Iterable[int], images: Sequence[range]) -> Int32:
    """Returns the bounds of each position's group: the image around it, or the position alone."""
    around = (next((image for image in images if at in image), range(at, at + 1)) for at in positions)
    return np.array([(group.start, group.stop) for group in around], np.int32).reshape(-1, 2)


def with_groups(batch: Batch, images: Sequence[range]) -> Batch:
    return replace(batch, groups=groups_at(batch.positions.tolist(), images))


def attending(case: Case, images: Sequence[range], **changes: object) -> Case:
    *copies, step = case.program.steps
    assert isinstance(step, Attention)
    program = program_of(case.program.hidden, case.program.out, *copies, replace(step, **changes))  # type: ignore[arg-type]
    return Case(program, case.weights, [(with_groups(batch, images), hidden) for batch, hidden in case.runs])


def causal_runs(borders: Sequence[int], **changes: object) -> Case:
    case = attention_case(HEADS, KV_HEADS, HEAD_DIM, [range(start, end) for start, end in pairwise(borders)])
    return attending(case, IMAGES, **changes)


def tensors_of(folder: Path, case: Case) -> Mapping[str, Tensor]:
    write_gguf(folder / "w.gguf", {}, [weight.source(name) for name, weight in case.weights.items()])
    return open_model(folder / "w.gguf").tensors


def dense(hidden: Float32, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Returns attention over all positions with float16 keys and values; mask [rows, positions]."""
    width = HEADS * HEAD_DIM
    q, k, v = np.split(hidden, [width, width + KV_HEADS * HEAD_DIM], axis=1)
    query = q.reshape(-1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM).astype(np.float64)
    key, value = (x.astype(np.float16).reshape(-1, KV_HEADS, HEAD_DIM).astype(np.float64) for x in (k, v))
    scores = np.einsum("rkgd,pkd->rkgp", query, key) / HEAD_DIM**0.5
    scores = np.where(mask[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: NDArray[np.float64] = np.einsum("rkgp,pkd->rkgd", weights, value).reshape(len(q), width)
    return out


@pytest.mark.parametrize("window", [None, 40, 700])
def test_causal_rows_also_see_their_group(tmp_path: Path, window: int | None) -> None:
    case = causal_runs(BORDERS, window=window)
    hidden = np.concatenate([part for _, part in case.runs if part is not None])
    at, groups = np.arange(BORDERS[-1]), groups_at(range(BORDERS[-1]), IMAGES)
    first = np.maximum(0, at + 1 - window) if window is not None else np.zeros_like(at)
    mask = (at >= first[:, None]) & (at < np.maximum(at + 1, groups[:, 1])[:, None])
    tensors = tensors_of(tmp_path, case)
    for name, make in BACKENDS.items():
        found = np.concatenate(run_case(make(), case, tensors))
        assert error(found, dense(hidden, mask).astype(np.float32)) < EXACT, name
    check_conformance(tmp_path, case, EXACT)


@pytest.mark.parametrize(
    "changes", [{"soft_cap": 3.0}, {"slopes": tuple(2.0**-i for i in range(1, 7))}, {"sinks": "s"}]
)
def test_groups_beside_other_options(tmp_path: Path, changes: dict[str, object]) -> None:
    case = causal_runs([0, 150, 330], **changes)
    if "sinks" in changes:
        case = Case(case.program, {**case.weights, "s": Weight(normal(generator_of("s"), HEADS))}, case.runs)
    check_conformance(tmp_path, case, EXACT)


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("changes", [{}, {"window": 70}, {"window": 512, "chunked": True}], ids=str)
def test_same_bits_in_any_batches(tmp_path: Path, kv_type: KvType, changes: dict[str, object]) -> None:
    """A row's bits depend neither on other rows in the batch nor on threads or groups that it does not attend to."""
    case = causal_runs(BORDERS, kv_type=kv_type, **changes)
    hidden = np.concatenate([part for _, part in case.runs if part is not None])
    tensors = tensors_of(tmp_path, case)

    def run(threads: int, borders: list[int]) -> Float32:
        runs = [
            (with_groups(rows_at(range(start, end)), IMAGES), hidden[start:end]) for start, end in pairwise(borders)
        ]
        found = run_case(all_threads(threads), Case(case.program, case.weights, runs), tensors)
        return np.concatenate(found)

    wanted = run(1, [*range(0, 20, 5), 120, 300, 324, 500, 530, 800, 905, 1105, *range(1106, 1111)])
    for threads in (1, 2, 3):
        found = run(threads, BORDERS)
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), f"{threads} threads")
    ungrouped = [(rows_at(range(start, end)), hidden[start:end]) for start, end in pairwise([0, 120, 300, 330])]
    plain = np.concatenate(run_case(all_threads(2), Case(case.program, case.weights, ungrouped), tensors))
    np.testing.assert_array_equal(plain[:20].view(np.uint32), wanted[:20].view(np.uint32))
    assert (plain[20:119] != wanted[20:119]).any(axis=1).all()


def test_sequences_beside_each_other(tmp_path: Path) -> None:
    """Sequences have groups at different positions, with decode rows in between."""
    generator, case = generator_of("several"), attention_case(HEADS, KV_HEADS, HEAD_DIM, [])
    tables = [[7, 3, 250, 9], [0, 4], [299, 1, 2, 5]]
    first = batch_of([([0] * 33, range(33), tables[0]), ([0] * 20, range(20), tables[1])])
    second = batch_of([([0], [33], tables[0]), ([0] * 12, range(20, 32), tables[1]), ([0] * 50, range(50), tables[2])])
    batches = [with_groups(batch, [range(3, 20), range(20, 31)]) for batch in (first, second)]
    runs = [(batch, 2 * normal(generator, batch.rows, case.program.hidden.width)) for batch in batches]
    check_conformance(tmp_path, Case(case.program, case.weights, runs), EXACT)


@pytest.mark.parametrize("widths", [[1, 2, 3, 58], [64] * 5, [16, 300], [330]], ids=str)
def test_rows_that_see_their_group_alone(tmp_path: Path, widths: list[int]) -> None:
    """Groups are windows of an encoder: each row attends to exactly its window."""
    ends = np.cumsum([0, *widths]).tolist()
    windows = [range(start, end) for start, end in pairwise(ends)]
    case = attending(attention_case(HEADS, KV_HEADS, HEAD_DIM, [range(ends[-1])]), windows, causal=False, grouped=True)
    groups = groups_at(range(ends[-1]), windows)
    mask = (groups[:, :1] <= np.arange(ends[-1])) & (np.arange(ends[-1]) < groups[:, 1:])
    ((_, hidden),) = case.runs
    assert hidden is not None
    found = run_case(ReferenceBackend(), case, tensors_of(tmp_path, case))[0]
    assert error(found, dense(hidden, mask).astype(np.float32)) < EXACT
    check_conformance(tmp_path, case, EXACT)


@pytest.mark.parametrize(
    ("row", "group", "reason"),
    [
        (5, (4, 8), "start of a group is 4, expected 3"),
        (5, (3, 9), "end of a group is 9, expected 8"),
        (3, (3, 3), "end of a group is 3, a row has position 3"),
        (0, (1, 2), "start of a group is 1, expected 0"),
        (9, (9, 11), "end of a group is 11, expected 10"),
        (9, (9, 1 << 30), "end of a group"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tmp_path: Path, row: int, group: tuple[int, int], reason: str) -> None:
    case = attending(attention_case(HEADS, KV_HEADS, HEAD_DIM, [range(10)]), [range(3, 8)])
    ((batch, _),) = case.runs
    assert batch.groups is not None
    batch.groups[row] = group
    with pytest.raises(ValueError, match=reason):
        run_case(all_threads(1), case, tensors_of(tmp_path, case))
