"""Quantizes a model file: tensor by tensor, rows in chunks over threads, into a file that appears when complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from llamaclust.tools.quantize.mixes import FLOATS
from llamaclust.tools.quantize.type_choice import EMBEDDINGS, Wishes, choose_types, needs_importance

_CHUNK_WEIGHTS = 1 << 20
_QUANTIZATION_VERSION = 2
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

Progress = Callable[[str, int, int | None], None]
Task = Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor: as it is, as it will be, and which of its columns matter [experts, columns], where that is known."""

    tensor: Tensor
    quant_type: QuantType
    importance: NDArray[np.float32] | None = None

    @property
    def n_bytes(self) -> int:
        return self.tensor.rows * self.quant_type.info.row_bytes(self.tensor.shape[-1])


@dataclass(frozen=True, slots=True)
class Quantizing:
    """What becomes of each tensor of a model, in its order."""

    model: ModelFile
    wishes: Wishes
    changes: tuple[Change, ...]

    @property
    def needing_importance(self) -> Change | None:
        """A tensor that is of no use in its type without an importance matrix that covers it."""
        return next((change for change in self.changes if change.importance is None and self._needs(change)), None)

    def _needs(self, change: Change) -> bool:
        tensor = change.tensor
        same = tensor.quant_type == change.quant_type
        return not same and needs_importance(tensor.name, change.quant_type, self.wishes.mix)


def plan_quantizing(
    model: ModelFile, wishes: Wishes, importance: ImportanceMatrix | None, allow_requantize: bool
) -> Quantizing:
    """UsageError, before anything is written, for what cannot be done."""
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
            f"tensor {name} is {was.name} already: take a file in F16, BF16 or F32, or give --allow-requantize"
        )
    if was not in QUANTIZED_TYPES:
        raise UsageError(f"tensor {name} is {was.name}, which cannot be quantized")
    if width % kind.info.block_size:
        raise UsageError(f"tensor {name} has rows of {width}, {kind.name} needs multiples of {kind.info.block_size}")


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
            f"the importance matrix has {entry.sums.size} values for {shown(tensor.name)}, {wanted} expected: it is of"
            " another model"
        )
    return entry.means.reshape(experts, width)


def write_quantized(job: Quantizing, out: Path, threads: int, keep_split: bool, progress: Progress) -> None:
    """Writes `out`, or its parts where `keep_split` and the model has several. UsageError, with nothing written, where
    the disk has too little room and for weights that are no finite numbers."""
    done_bytes = _ByteProgress(progress, sum(change.n_bytes for change in job.changes))
    count = len(job.model.parts) if keep_split else 1
    files = {}
    with _Workers(threads) as workers:
        for number, path in enumerate(part_paths(out, count)):
            part = job.model.parts[number] if count > 1 else None
            changes = [change for change in job.changes if part is None or change.tensor.path == part]
            sources = [_source(change, workers, done_bytes) for change in changes]
            files[path] = Contents.of(_metadata(job, number, count), sources)
        write_gguf_parts(files)


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


class _ByteProgress:
    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress, self._total, self._done = progress, total_bytes, 0

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        self._progress("quantizing", self._done, self._total)


class _Workers:
    """Threads; at the end, also the end by an error, what has not begun is dropped."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def in_order(self, tasks: Sequence[Task]) -> Iterator[NDArray[np.uint8]]:
        yield from self._pool.map(lambda task: task(), tasks)


def _source(change: Change, workers: _Workers, done_bytes: _ByteProgress) -> TensorSource:
    tensor = change.tensor

    def produce() -> memoryview:
        out = np.empty(change.n_bytes, np.uint8)
        done = 0
        for piece in workers.in_order(_tasks(change)):
            out[done : done + piece.size] = piece.reshape(-1)
            done += piece.size
            done_bytes.add(piece.size)
        return out.data

    return TensorSource(tensor.name, change.quant_type, tensor.shape, produce)


def _tasks(change: Change) -> list[Task]:
    """Rows of one expert at a time, some of them a task."""
    tensor = change.tensor
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, _CHUNK_WEIGHTS // tensor.shape[-1])
    tasks: list[Task] = []
    for expert in range(prod(tensor.shape[:-2])):
        known = None if change.importance is None else as_importance(change.importance[expert])
        for row in range(0, rows, step):
            first, end = expert * rows + row, expert * rows + min(row + step, rows)
            tasks.append(_Rows(tensor, change.quant_type, first, end, known))
    return tasks


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows [first, end) of a tensor in another type."""

    tensor: Tensor
    quant_type: QuantType
    first: int
    end: int
    importance: NDArray[np.float32] | None

    def __call__(self) -> NDArray[np.uint8]:
        tensor = self.tensor
        data = bytearray((self.end - self.first) * tensor.row_bytes)
        tensor.read_into(data, self.first * tensor.row_bytes)
        if self.quant_type == tensor.quant_type:
            return np.frombuffer(data, np.uint8)
        x = to_floats(tensor.quant_type, data, tensor.shape[-1])
        self._check(x)
        return quantize(self.quant_type, x, self.importance)

    def _check(self, x: NDArray[np.float32]) -> None:
        low, high, most = float(x.min()), float(x.max()), most_of(self.quant_type)
        if -most <= low and high <= most:
            return
        bad = ~(np.abs(x) <= most)
        row, column = (int(index[0]) for index in np.nonzero(bad))
        raise UsageError(
            f"tensor {shown(self.tensor.name)} has {x[row, column]:g} at row {self.first + row}, column {column}:"
            f" {self.quant_type.name} holds numbers up to {most:g}; take a model file without such weights"
        )


def sizes_by_type(job: Quantizing) -> Mapping[tuple[QuantType, QuantType], tuple[int, int, int]]:
    """(was, becomes) -> tensors, bytes before, bytes after; the largest first."""
    sums: dict[tuple[QuantType, QuantType], tuple[int, int, int]] = {}
    for change in job.changes:
        key = (change.tensor.quant_type, change.quant_type)
        tensors, before, after = sums.get(key, (0, 0, 0))
        sums[key] = (tensors + 1, before + change.tensor.n_bytes, after + change.n_bytes)
    return dict(sorted(sums.items(), key=lambda item: -item[1][2]))
