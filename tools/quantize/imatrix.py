"""Collects a model's importance matrix as llama-imatrix does: the sum of squared inputs for each column of a matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import LlamaclustError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage, Inputs
from llamaclust.model.gguf.values import shown
from llamaclust.model.imatrix import Importance, ImportanceMatrix
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.tools.progress import Progress

_ROWS = 64
"""Number of rows in a microbatch. It bounds memory, since every matrix keeps its inputs for all rows."""

_OUTPUT = "output.weight"


def collect(
    model: Model, chunks: Sequence[tuple[int, ...]], threads: int, text: str, with_output: bool, progress: Progress
) -> ImportanceMatrix:
    """Runs the chunks, and sums the squared inputs of each layer's matrices. `with_output` includes the output
    matrix. Raises LlamaclustError if a sum is not finite."""
    context = len(chunks[0])
    blocks = -(-context // KV_BLOCK_TOKENS)
    rows = min(_ROWS, context)
    limits = StageLimits(rows, rows, 1, context, blocks)
    program = model.program(0, model.layer_count)
    sums = _Sums(model, with_output)
    with closing(
        CpuBackend(threads).load(program, model.tensors_for(program), limits, lambda done_bytes: None, observed=True)
    ) as stage:
        for number, chunk in enumerate(chunks):
            for count in _run(stage, chunk, rows, blocks):
                for inputs in stage.inputs(count):
                    sums.add(inputs)
            progress("chunks", number + 1, len(chunks))
    return ImportanceMatrix(sums.entries(), len(chunks), context, (text,))


def _run(stage: CpuStage, chunk: tuple[int, ...], rows: int, blocks: int) -> Iterator[int]:
    """Runs a chunk in microbatches, and yields each microbatch's number of rows."""
    for start in range(0, len(chunk), rows):
        tokens = np.array(chunk[start : start + rows], np.int32)
        count = len(tokens)
        positions = np.arange(start, start + count, dtype=np.int32)
        batch = Batch(
            tokens,
            positions,
            sequence_starts=np.array([0, count], np.int32),
            table_starts=np.array([0, blocks], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32),
            # The last layer would skip rows that are not output rows.
            output_rows=np.arange(count, dtype=np.int32),
        )
        stage.run(batch, None)
        yield count


class _Sums:
    """Sums of squared inputs, in float64 and in token order, so that results do not depend on the thread count."""

    def __init__(self, model: Model, with_output: bool) -> None:
        self._model, self._with_output = model, with_output
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def add(self, inputs: Inputs) -> None:
        names = [name for name in inputs.weights if name.startswith("blk.") or (self._with_output and name == _OUTPUT)]
        if not names:
            return
        if inputs.chosen is None:
            self._add(names, 0, inputs.x)
            return
        rows, used = inputs.chosen.shape
        x = inputs.x if len(inputs.x) == rows * used else np.repeat(inputs.x, used, axis=0)
        chosen = inputs.chosen.reshape(-1)
        for expert in np.unique(chosen):
            self._add(names, int(expert), x[chosen == expert])

    def _add(self, names: Sequence[str], expert: int, x: NDArray[np.float32]) -> None:
        squares = np.einsum("ij,ij->j", x, x, dtype=np.float64)
        for name in names:
            if name not in self._sums:
                tensor = self._model.file.tensor(name)
                experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
                self._sums[name] = np.zeros((experts, tensor.shape[-1]))
                self._counts[name] = np.zeros(experts, np.int64)
            self._sums[name][expert] += squares
            self._counts[name][expert] += len(x)

    def entries(self) -> dict[str, Importance]:
        for name, sums in self._sums.items():
            if not np.isfinite(sums).all():
                raise LlamaclustError(
                    f"activations before {shown(name)} are not finite numbers; check that the model is not damaged"
                )
        return {
            name: Importance(sums.astype(np.float32), self._counts[name].astype(np.float32))
            for name, sums in self._sums.items()
        }
