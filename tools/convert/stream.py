"""Writes a GGUF file as a stream: some rows of a tensor at a time are read and converted by threads and written in
order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

from llamaclust.model.gguf.atomic_file import new_file
from llamaclust.model.gguf.header import DEFAULT_ALIGNMENT
from llamaclust.model.gguf.writer import TensorSource, WritableValue, header_bytes
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.elements import encoded
from llamaclust.tools.convert.lazy import Lazy

_CHUNK_ELEMENTS: Final = 1 << 21
_FLUSH_BYTES: Final = 1 << 26

OnProgress = Callable[[int, int], None]
"""Called with the bytes done and the total."""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor as it is to be written."""

    name: str
    quant_type: QuantType
    tensor: Lazy

    @property
    def source(self) -> TensorSource:
        return TensorSource(self.name, self.quant_type, self.tensor.shape, bytes)


def write_stream(
    path: Path,
    metadata: Mapping[str, WritableValue],
    outputs: Sequence[Output],
    on_progress: OnProgress,
    threads: int,
    check: Callable[[], None],
) -> None:
    """UsageError, before anything is written, where the disk has too little room. `check` is called before the file
    gets its name."""
    sources = [output.source for output in outputs]
    header = header_bytes(metadata, sources)
    total = len(header) + sum(_padded(source.n_bytes, DEFAULT_ALIGNMENT) for source in sources)
    with new_file(path, total) as file:
        file.write(header)
        write_pieces(file, outputs, lambda done, _: on_progress(len(header) + done, total), threads)
        check()


def write_pieces(
    file: BinaryIO, outputs: Sequence[Output], on_progress: OnProgress, threads: int, alignment: int = DEFAULT_ALIGNMENT
) -> None:
    """All tensors' bytes from where the file stands on, each from a multiple of `alignment` on."""
    total = sum(_padded(output.source.n_bytes, alignment) for output in outputs)
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
    """Lets the disk write while the next pieces are made, so that little is left for the end; and what has been
    written needs no memory any more."""
    file.flush()
    os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_DONTNEED)


def _pieces(
    outputs: Iterable[Output], pool: ThreadPoolExecutor, threads: int, alignment: int
) -> Iterator[memoryview | bytes]:
    """All tensors' bytes in order, with the zeros between them; a few pieces are made ahead."""
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
            yield _task(output, start, min(start + step, tensor.shape[0]))
        n_bytes = output.source.n_bytes
        padding = bytes(_padded(n_bytes, alignment) - n_bytes)
        if padding:
            yield lambda data=padding: data  # type: ignore[misc]


def _task(output: Output, start: int, end: int) -> Callable[[], memoryview]:
    def make() -> memoryview:
        tensor = output.tensor
        values = tensor.read(start, end)
        assert values.shape == (end - start, *tensor.shape[1:]), (output.name, values.shape)
        data = encoded(values, tensor.storage, output.quant_type, tensor.origin)
        rows = (end - start) * prod(tensor.shape[1:-1]) if len(tensor.shape) > 1 else 1
        width = tensor.shape[-1] if len(tensor.shape) > 1 else end - start
        assert len(data) == rows * output.quant_type.info.row_bytes(width), output.name
        return data

    return make


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
