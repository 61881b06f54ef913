"""Checks that the choice, grouping and combination of experts on a GPU give the bits of the CPU's whole step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cuda.launches.experts import (
    ExpertBuffers,
    RouterOutput,
    choice_bytes,
    choose,
    combine,
    group,
    items_bytes,
    max_items,
)
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import NULL
from llamaclust.kernels.cuda.runtime.device import Buffer as Memory
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.program import Buffer, MatMul, Moe, Program, SiluMul
from llamaclust.model.steps.options import ExpertOptions, Gating
from support.arithmetic.backends import all_threads
from support.arithmetic.matmul_cases import check_equal_bits
from support.arithmetic.single_steps import Weight, normal, program_of, rows_at
from support.cuda.launching import Bench
from support.cuda.random_numbers import generator

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
_Number = TypeVar("_Number", np.int32, np.float32)

WIDTH, FFN = 40, 24
LIMITS = StageLimits(max_batch_tokens=64, max_outputs=64, max_sequences=1, max_context_tokens=64, kv_blocks=4)


def moe(experts: int, used: int, *, normalized: bool = True) -> Moe:
    x, out = Buffer("x", WIDTH), Buffer("out", WIDTH)
    return Moe(x, out, "router", "gate", "up", "down", experts, used, FFN, ExpertOptions(normalized=normalized))


class OnDevice:
    """Device arrays of the step, with three padding rows."""

    def __init__(self, bench: Bench, step: Moe, rows: int, piece: int, *vectors: Float32 | None) -> None:
        """`vectors` are the bias of the choice and the scales of experts, or None."""
        self.bench, self.step, self.rows, self.piece, self.room = bench, step, rows, piece, rows + 3
        self.ids, self.weights, self.lines = (bench.room(choice_bytes(step, self.room)) for _ in range(3))
        self.items, self.item_count = bench.room(items_bytes(step, self.room, piece)), bench.room(4)
        arrays = (self.ids, self.weights, self.lines, self.items, self.item_count)
        self.vectors = [NULL if vector is None else bench.put(vector).at() for vector in vectors]
        self.places = ExpertBuffers(*(array.at() for array in arrays))
        self.count = RowCount(self.room, bench.put(np.array([rows], np.int32)).at())

    def choose(self, logits: Float32) -> tuple[Int32, Float32]:
        padded = self.bench.put(np.concatenate([logits, np.zeros((3, self.step.experts), np.float32)]))
        self.bench.device.launch(choose(self.step, RouterOutput(padded.at(), *self.vectors), self.places, self.count))
        return self._chosen(self.ids, np.int32), self._chosen(self.weights, np.float32)

    def _chosen(self, memory: Memory, dtype: type[_Number]) -> NDArray[_Number]:
        chosen: NDArray[_Number] = self.bench.get(memory, (self.room, self.step.used), dtype)[: self.rows]
        return chosen

    def group(self) -> tuple[Int32, Int32]:
        """Returns the lines, and the items: expert, first place and count."""
        self.bench.device.launch(group(self.step, self.places, self.piece, self.count))
        (count,) = self.bench.get(self.item_count, 1, np.int32)
        assert count <= max_items(self.step, self.room, self.piece)
        items = self.bench.get(self.items, (int(count), 3), np.int32) if count else np.zeros((0, 3), np.int32)
        return self.bench.get(self.lines, self.rows * self.step.used, np.int32), items

    def combine(self, x: Float32) -> Float32:
        out = self.bench.room(4 * self.room * WIDTH)
        unused = np.full((3 * self.step.used, WIDTH), np.nan, np.float32)
        padded = self.bench.put(np.concatenate([x, unused]))
        self.bench.device.launch(combine(self.step, padded.at(), self.places, out.at(), self.count))
        return self.bench.get(out, (self.room, WIDTH))[: self.rows]


def run(folder: Path, program: Program, weights: dict[str, Weight], rows: Float32) -> Float32:
    path = folder / "weights.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in weights.items()])
    stage = all_threads(2).load(program, dict(open_model(path).tensors), LIMITS, lambda _: None)
    found = stage.run(rows_at(range(len(rows))), rows).copy()
    stage.close()
    return found


def every_expert(folder: Path, step: Moe, weights: dict[str, Weight], rows: Float32) -> list[Float32]:
    """Returns the results of each expert for all rows."""
    gate, up, down = (Buffer(name, width) for name, width in (("g", FFN), ("u", FFN), ("d", WIDTH)))
    steps = (
        MatMul(step.x, gate, "gate"),
        MatMul(step.x, up, "up"),
        SiluMul(gate, up, gate),
        MatMul(gate, down, "down"),
    )
    program = program_of(step.x, down, *steps)
    each = [{name: Weight(weights[name].values[e]) for name in ("gate", "up", "down")} for e in range(step.experts)]
    return [run(folder, program, of_one, rows) for of_one in each]


@pytest.mark.parametrize("groups", [(1, 1), (5, 2)], ids=["no groups", "groups"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "gating",
    [
        (Gating.SOFTMAX, True, 1.0),
        (Gating.SOFTMAX, False, 1.0),
        (Gating.SIGMOID, True, 2.5),
        (Gating.SIGMOID, False, 0.3),
        (Gating.SOFTMAX_OF_CHOSEN, False, 1.0),
    ],
)
@pytest.mark.parametrize("shape", [(5, 2, 9), (70, 5, 20), (3, 3, 1)])
def test_the_bits_of_the_cpu(
    bench: Bench,
    tmp_path: Path,
    shape: tuple[int, int, int],
    gating: tuple[Gating, bool, float],
    biased: bool,
    groups: tuple[int, int],
) -> None:
    """Cases with a bias of the choice also have scales of experts."""
    (experts, used, rows), (kind, normalized, scale) = shape, gating
    count, used_groups = groups if experts % groups[0] == 0 else (experts, experts)
    source, plain = generator(), moe(experts, used, normalized=normalized)
    names = ("bias", "scales") if biased else (None, None)
    options = ExpertOptions(kind, normalized, scale, count, used_groups)
    step = replace(plain, options=options, selection_bias=names[0], expert_scales=names[1])
    weights = {
        "router": Weight(normal(source, experts, WIDTH)),
        "gate": Weight(normal(source, experts, FFN, WIDTH)),
        "up": Weight(normal(source, experts, FFN, WIDTH)),
        "down": Weight(normal(source, experts, WIDTH, FFN)),
    }
    vectors = [normal(source, experts) if name else None for name in names]
    weights |= {
        name: Weight(vector) for name, vector in zip(names, vectors, strict=True) if name and vector is not None
    }
    x = normal(source, rows, WIDTH) / np.float32(4)
    wanted = run(tmp_path, program_of(step.x, step.out, step), weights, x)
    scores = Buffer("scores", experts)
    router = program_of(step.x, scores, MatMul(step.x, scores, "router"))
    logits = run(tmp_path, router, {"router": weights["router"]}, x)
    device = OnDevice(bench, step, rows, 8, *vectors)
    ids, _ = device.choose(logits)
    if not biased and count == 1:
        np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :used])
    outputs = every_expert(tmp_path, step, weights, x)
    lines = [outputs[ids[row, rank]][row] for row in range(rows) for rank in range(used)]
    found = device.combine(np.array(lines))
    check_equal_bits(found, wanted)


@pytest.mark.parametrize(
    ("experts", "used", "rows", "piece"), [(128, 8, 41, 8), (5, 2, 61, 64), (40, 1, 1, 8), (600, 3, 350, 8)]
)
def test_lines_are_grouped(bench: Bench, experts: int, used: int, rows: int, piece: int) -> None:
    """Each line occurs once, beside the other lines of its expert, in pieces of at most `piece` lines."""
    device = OnDevice(bench, moe(experts, used), rows, piece)
    logits = normal(generator(), rows, experts)
    logits[:, 1] += 4  # an expert that most rows choose
    ids = device.choose(logits)[0].reshape(-1)
    lines, items = device.group()
    np.testing.assert_array_equal(np.sort(lines), np.arange(rows * used))
    np.testing.assert_array_equal(ids[lines], np.sort(ids))
    wanted = []
    for expert, begin in zip(*np.unique(np.sort(ids), return_index=True), strict=True):
        count = int((ids == expert).sum())
        wanted += [(expert, begin + at, min(piece, count - at)) for at in range(0, count, piece)]
    assert items.tolist() == [list(map(int, item)) for item in wanted]


def test_ties_go_to_the_lower_id_and_no_numbers_to_the_first(bench: Bench) -> None:
    """A row with NaN or infinity chooses expert 0 at every rank, so that it may have more lines than there are rows."""
    device = OnDevice(bench, moe(40, 3), 5, 8)
    logits = np.zeros((5, 40), np.float32)
    logits[1, 33:36] = 2
    logits[2, [5, 38]], logits[3], logits[4, 7] = 1, np.nan, np.inf
    ids, weights = device.choose(logits)
    assert ids.tolist() == [[0, 1, 2], [33, 34, 35], [5, 38, 0], [0, 0, 0], [0, 0, 0]]
    assert np.isnan(weights[3:, 0]).all()
    assert np.isfinite(weights[:3]).all()
    lines, items = device.group()
    assert sorted(lines.tolist()) == list(range(15))
    assert items[0].tolist() == [0, 0, 8]
