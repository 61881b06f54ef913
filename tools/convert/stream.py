"""Writes GGUF files as a stream. Threads read and convert ranges of rows. The ranges are written in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels.cpu.quantize import narrowed
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.model.gguf.atomic_file import new_file
from llamaclust.model.gguf.header import DEFAULT_ALIGNMENT
from llamaclust.model.gguf.values import padded
from llamaclust.model.gguf.writer import TensorSource, WritableValue, header_bytes
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.lazy import Array, Lazy, as_floats

OUTPUT_TYPES: Final = {"f32": QuantType.F32, "f16": QuantType.F16, "bf16": QuantType.BF16, "q8_0": QuantType.Q8_0}
_STORED: Final = {Storage.F32: QuantType.F32, Storage.F16: QuantType.F16, Storage.BF16: QuantType.BF16}
_LARGEST_F16: Final = 65504
_CHUNK_ELEMENTS: Final = 1 << 21
_FLUSH_BYTES: Final = 1 << 26

OnProgress = Callable[[int, int], None]
"""Receives the number of bytes written so far, and the total."""


@dataclass(frozen=True, slots=True)
class Output:
    name: str
    quant_type: QuantType
    tensor: Lazy

    @property
    def n_bytes(self) -> int:
        return self.quant_type.tensor_bytes(self.tensor.shape)


def write_stream(
    path: Path,
    metadata: Mapping[str, WritableValue],
    outputs: Sequence[Output],
    on_progress: OnProgress,
    threads: int,
    check: Callable[[], None],
) -> None:
    """Writes a GGUF file. Raises UsageError at the beginning if the disk lacks space. `check` is called at the end,
    before the file is renamed to `path`."""
    header = header_bytes(
        metadata, [TensorSource(output.name, output.quant_type, output.tensor.shape, bytes) for output in outputs]
    )
    total = len(header) + sum(padded(output.n_bytes, DEFAULT_ALIGNMENT) for output in outputs)
    with new_file(path, total) as file:
        file.write(header)
        write_pieces(file, outputs, lambda done, _: on_progress(len(header) + done, total), threads)
        check()


def write_pieces(
    file: BinaryIO, outputs: Sequence[Output], on_progress: OnProgress, threads: int, alignment: int = DEFAULT_ALIGNMENT
) -> None:
    total = sum(padded(output.n_bytes, alignment) for output in outputs)
    start = file.tell()
    done = flushed = 0
    on_progress(done, total)
    with ThreadPoolExecutor(threads, thread_name_prefix="convert") as pool:
        for data in _pieces(outputs, pool, threads, alignment):
            file.write(data)
            done += len(data)
            on_progress(done, total)
            if done - flushed > _FLUSH_BYTES:
                _begin_writing(file, start + flushed, done - flushed)
                flushed = done


def _begin_writing(file: BinaryIO, start: int, count: int) -> None:
    """Lets the kernel write a range to disk and drop it from the page cache, while the next pieces are converted."""
    file.flush()
    os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_DONTNEED)


def _pieces(
    outputs: Iterable[Output], pool: ThreadPoolExecutor, threads: int, alignment: int
) -> Iterator[memoryview | bytes]:
    """Yields the bytes of all tensors in order, with padding. Threads convert a few pieces in advance."""
    ahead: deque[Future[memoryview | bytes]] = deque()
    try:
        for make in _tasks(outputs, alignment):
            ahead.append(pool.submit(make))
            if len(ahead) > threads + 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def _tasks(outputs: Iterable[Output], alignment: int) -> Iterator[Callable[[], memoryview | bytes]]:
    for output in outputs:
        tensor = output.tensor
        step = max(1, _CHUNK_ELEMENTS // max(1, tensor.row_elements))
        for start in range(0, tensor.shape[0], step):
            yield partial(_rows, output, start, min(start + step, tensor.shape[0]))
        if padding := padded(output.n_bytes, alignment) - output.n_bytes:
            yield partial(bytes, padding)


def _rows(output: Output, start: int, end: int) -> memoryview:
    tensor = output.tensor
    values = tensor.read(start, end)
    if tensor.packed is not None:
        return _blocks(output, values)
    assert values.shape == (end - start, *tensor.shape[1:]), (output.name, values.shape)
    data = encoded(values, tensor.storage, output.quant_type, tensor.origin)
    assert len(data) == output.quant_type.tensor_bytes(values.shape), output.name
    return data


def _blocks(output: Output, values: Array) -> memoryview:
    shape, kind = output.tensor.shape, output.quant_type
    assert kind is output.tensor.packed and values.dtype == np.uint8, output.name
    assert values.shape[1:] == (*shape[1:-1], kind.info.row_bytes(shape[-1])), (output.name, values.shape)
    return np.ascontiguousarray(values).data.cast("B")


def encoded(values: Array, storage: Storage, quant_type: QuantType, origin: str) -> memoryview:
    """Encodes rows as `quant_type`. Raises ModelFileError for numbers that float16 cannot hold."""
    values = np.ascontiguousarray(values)
    if storage.name == quant_type.name:
        return values.data.cast("B")
    if storage not in _STORED:
        values, storage = as_floats(values, storage), Storage.F32
    found = narrowed(values, _STORED[storage], quant_type)
    if found is None:
        raise _range_error(as_floats(values, storage), quant_type, origin)
    return found.data


def _range_error(values: NDArray[np.float32], quant_type: QuantType, origin: str) -> ModelFileError:
    if not np.isfinite(values).all():
        return ModelFileError(f"{origin} has numbers that are not finite; convert with --type f32 or bf16 to keep them")
    what = f"{np.abs(values).max():g} does not fit {quant_type.name.lower()}"
    return ModelFileError(f"{origin}: {what} (largest: {_LARGEST_F16}); convert with --type bf16")
