"""Programs of a few steps with given weights, and the comparison of backends on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Batch
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.program import KV_BLOCK_TOKENS, Buffer, MatMul, Program, Step
from llamaclust.model.quant_types import QuantType
from support.arithmetic.backends import BACKENDS
from support.arithmetic.batches import batch_of
from support.models.tiny_quantizers import quantize

Float32 = NDArray[np.float32]

LIMITS = StageLimits(max_batch_tokens=330, max_outputs=330, max_sequences=8, max_context_tokens=4096, kv_blocks=300)


@dataclass(frozen=True, slots=True)
class Weight:
    """Values [..., k] and the quant type in which they are stored."""

    values: Float32
    quant_type: QuantType = QuantType.F32

    def source(self, name: str) -> TensorSource:
        return TensorSource(name, self.quant_type, self.values.shape, lambda: quantize(self.values, self.quant_type))


@dataclass(frozen=True, slots=True)
class Case:
    """A program, its weights, and consecutive batches with their hidden states."""

    program: Program
    weights: Mapping[str, Weight]
    runs: Sequence[tuple[Batch, Float32 | None]]


def program_of(hidden: Buffer, out: Buffer, *steps: Step, first: bool = False, last: bool = False) -> Program:
    """Builds one layer of three, by default the middle one."""
    start = 0 if first else 2 if last else 1
    return Program(start, start + 1, 3, hidden, out, steps)


def rows_at(positions: Sequence[int] | range) -> Batch:
    """Returns a batch of one sequence at ascending positions, in blocks 0, 1, 2, ..."""
    return batch_of([([0] * len(positions), positions, range(positions[-1] // KV_BLOCK_TOKENS + 1))])


def normal(generator: np.random.Generator, *shape: int) -> Float32:
    values = generator.standard_normal(shape, np.float32)
    assert len(np.unique(values)) > 0.9 * values.size
    return values


def splitter(x: Buffer, parts: Sequence[Buffer]) -> tuple[list[Step], dict[str, Weight]]:
    """Builds steps that copy consecutive columns of x into `parts` without rounding."""
    assert x.width == sum(part.width for part in parts)
    chosen = np.split(np.eye(x.width, dtype=np.float32), np.cumsum([part.width for part in parts])[:-1])
    weights = {f"{part.name}.weight": Weight(rows) for part, rows in zip(parts, chosen, strict=True)}
    return [MatMul(x, part, f"{part.name}.weight") for part in parts], weights


def error(found: Float32, wanted: Float32) -> float:
    """Returns sum((found - wanted)^2) / sum(wanted^2)."""
    assert found.shape == wanted.shape
    reference = wanted.astype(np.float64)
    return float(((found - reference) ** 2).sum() / (reference**2).sum())


def flat(runs: Sequence[Float32]) -> Float32:
    """Concatenates all runs, since a single number may be a small difference of large ones."""
    return np.concatenate([rows.reshape(-1) for rows in runs])


def run_case(backend: Backend, case: Case, tensors: Mapping[str, Tensor]) -> list[Float32]:
    stage = backend.load(case.program, dict(tensors), LIMITS, lambda done_bytes: None)
    outputs = [stage.run(batch, hidden).copy() for batch, hidden in case.runs]
    stage.close()
    return outputs


def check_conformance(folder: Path, case: Case, bound: float) -> None:
    """Checks that every backend is within `bound` of the reference, with equal bits at all CPU levels and thread
    counts."""
    path = folder / "weights.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in case.weights.items()])
    tensors = open_model(path).tensors
    wanted = run_case(ReferenceBackend(), case, tensors)
    assert all(len(np.unique(rows)) > min(4, rows.size // 2) for rows in wanted)
    first: list[Float32] | None = None
    for name, make in BACKENDS.items():
        found = run_case(make(), case, tensors)
        assert [rows.shape for rows in found] == [rows.shape for rows in wanted]
        assert error(flat(found), flat(wanted)) <= bound, (name, error(flat(found), flat(wanted)))
        if name == "reference":
            continue
        first = first or found
        for run, (rows, bits) in enumerate(zip(found, first, strict=True)):
            np.testing.assert_array_equal(rows.view(np.uint32), bits.view(np.uint32), f"{name}, run {run}")
