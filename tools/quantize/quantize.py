"""Quantizes a model file tensor by tensor. The new file appears only when it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import UsageError
from llamaclust.kernels.cpu.quantize import QUANTIZED_TYPES, as_importance, most_of, quantize, to_floats
from llamaclust.model.gguf.atomic_file import part_paths
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.values import shown
from llamaclust.model.gguf.writer import Contents, TensorSource, WritableValue, write_gguf_parts
from llamaclust.model.imatrix import ImportanceMatrix
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.progress import ByteProgress, Progress
from llamaclust.tools.quantize.mixes import FLOATS
from llamaclust.tools.quantize.type_choice import EMBEDDINGS, MixChoice, choose_types, needs_importance

_CHUNK_WEIGHTS = 1 << 20
_QUANTIZATION_VERSION = 2
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor and its new type. `importance` is the importance of the tensor's columns [experts, columns], or None."""

    tensor: Tensor
    quant_type: QuantType
    importance: NDArray[np.float32] | None = None

    @property
    def n_bytes(self) -> int:
        return self.tensor.rows * self.quant_type.info.row_bytes(self.tensor.shape[-1])


@dataclass(frozen=True, slots=True)
class Quantizing:
    model: ModelFile
    wishes: MixChoice
    changes: tuple[Change, ...]

    @property
    def needing_importance(self) -> Change | None:
        return next((change for change in self.changes if change.importance is None and self._needs(change)), None)

    def _needs(self, change: Change) -> bool:
        kind = change.quant_type
        return kind != change.tensor.quant_type and needs_importance(change.tensor.name, kind, self.wishes.mix)


def plan_quantizing(
    model: ModelFile, wishes: MixChoice, importance: ImportanceMatrix | None, allow_requantize: bool
) -> Quantizing:
    """Chooses the new type of each tensor. Raises UsageError if a change is impossible."""
    types = choose_types(model, replace(wishes, has_importance=importance is not None))
    changes = []
    for tensor in model.tensors.values():
        kind = types[tensor.name]
        _check(tensor, kind, allow_requantize)
        known = None if importance is None or kind == tensor.quant_type else _importance(importance, tensor)
        changes.append(Change(tensor, kind, known))
    return Quantizing(model, wishes, tuple(changes))


def _check(tensor: Tensor, kind: QuantType, allow_requantize: bool) -> None:
    if kind == tensor.quant_type:
        return
    name, was, width = shown(tensor.name), tensor.quant_type, tensor.shape[-1]
    if was not in FLOATS and not allow_requantize:
        raise UsageError(
            f"tensor {name} is already {was.name}: use a file in F16, BF16 or F32, or give --allow-requantize"
        )
    if was not in QUANTIZED_TYPES:
        raise UsageError(f"tensor {name} is {was.name}, which cannot be quantized")
    if width % kind.info.block_size:
        raise UsageError(
            f"tensor {name} has rows of {width} weights, but {kind.name} needs a multiple of {kind.info.block_size}"
        )


def _importance(matrix: ImportanceMatrix, tensor: Tensor) -> NDArray[np.float32] | None:
    entry = matrix.entries.get(tensor.name)
    if entry is None:
        return None
    experts, width = prod(tensor.shape[:-2]), tensor.shape[-1]
    if entry.sums.size != experts * width:
        if tensor.name in EMBEDDINGS:
            return None
        wanted = f"{experts} x {width}" if experts > 1 else str(width)
        raise UsageError(
            f"the importance matrix is of another model: expected {wanted} values for {shown(tensor.name)}, "
            f"found {entry.sums.size}"
        )
    return entry.means.reshape(experts, width)


def write_quantized(job: Quantizing, out: Path, threads: int, keep_split: bool, progress: Progress) -> None:
    """Writes `out`, or one file for each part of the model if `keep_split` is True. Raises UsageError if the disk lacks
    space or a weight is not finite. After an error, no file is left."""
    done = ByteProgress(progress, sum(change.n_bytes for change in job.changes))
    count = len(job.model.parts) if keep_split else 1
    files = {}
    pool = ThreadPoolExecutor(threads)
    try:
        for number, path in enumerate(part_paths(out, count)):
            part = job.model.parts[number] if count > 1 else None
            changes = [change for change in job.changes if part is None or change.tensor.path == part]
            sources = [_source(change, pool, done) for change in changes]
            files[path] = Contents.of(_metadata(job, number, count), sources)
        write_gguf_parts(files)
    finally:
        pool.shutdown(cancel_futures=True)


def _metadata(job: Quantizing, number: int, count: int) -> dict[str, WritableValue]:
    metadata: dict[str, WritableValue] = {}
    if number == 0:
        metadata |= {key: value for key, value in job.model.metadata.items() if key not in _SPLIT_KEYS}
        metadata |= {
            "general.quantization_version": _QUANTIZATION_VERSION,
            "general.file_type": job.wishes.mix.file_type,
        }
    if count > 1:
        numbers = (np.uint16(number), np.uint16(count), np.int32(len(job.changes)))
        metadata |= dict(zip(_SPLIT_KEYS, numbers, strict=True))
    return metadata


def _source(change: Change, pool: ThreadPoolExecutor, progress: ByteProgress) -> TensorSource:
    def produce() -> memoryview:
        out = np.empty(change.n_bytes, np.uint8)
        done = 0
        for piece in pool.map(lambda rows: _quantized(change, rows), _row_ranges(change.tensor)):
            out[done : done + piece.size] = piece.reshape(-1)
            done += piece.size
            progress.add("quantizing", piece.size)
        return out.data

    return TensorSource(change.tensor.name, change.quant_type, change.tensor.shape, produce)


def _row_ranges(tensor: Tensor) -> list[range]:
    """Divides all rows into ranges. No range has rows of two experts."""
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, _CHUNK_WEIGHTS // tensor.shape[-1])
    starts = range(0, tensor.rows, rows)
    return [
        range(first, min(first + step, start + rows)) for start in starts for first in range(start, start + rows, step)
    ]


def _quantized(change: Change, rows: range) -> NDArray[np.uint8]:
    tensor = change.tensor
    data = bytearray(len(rows) * tensor.row_bytes)
    tensor.read_into(data, rows.start * tensor.row_bytes)
    if change.quant_type == tensor.quant_type:
        return np.frombuffer(data, np.uint8)
    x = to_floats(tensor.quant_type, data, tensor.shape[-1])
    most = most_of(change.quant_type)
    if not (-most <= float(x.min()) and float(x.max()) <= most):
        row, column = (int(index[0]) for index in np.nonzero(~(np.abs(x) <= most)))
        raise UsageError(
            f"tensor {shown(tensor.name)} has {x[row, column]:g} at row {rows.start + row}, column {column}:"
            f" {change.quant_type.name} holds numbers up to {most:g}; use a model file without such weights"
        )
    expert = rows.start // tensor.shape[-2] if len(tensor.shape) > 1 else 0
    return quantize(
        change.quant_type, x, None if change.importance is None else as_importance(change.importance[expert])
    )


def sizes_by_type(job: Quantizing) -> Mapping[tuple[QuantType, QuantType], tuple[int, int, int]]:
    """Maps (old type, new type) to (number of tensors, old bytes, new bytes), sorted by new bytes, largest first."""
    sums: dict[tuple[QuantType, QuantType], tuple[int, int, int]] = {}
    for change in job.changes:
        key = (change.tensor.quant_type, change.quant_type)
        tensors, before, after = sums.get(key, (0, 0, 0))
        sums[key] = (tensors + 1, before + change.tensor.n_bytes, after + change.n_bytes)
    return dict(sorted(sums.items(), key=lambda item: -item[1][2]))
