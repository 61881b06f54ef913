"""Reads and writes files of a model's logits over a text, for comparison with another model. The format is llama.cpp's
(`llama-perplexity --kl-divergence-base`). All numbers are little-endian. The file begins with `_logits_`, the uint32
number of tokens in a chunk (context), the int32 vocabulary size, the int32 number of chunks, and int32 tokens [chunks,
context]. Rows follow, one for each chunk and each position in [context // 2, context - 1): float32 step, float32
minimum, and uint16 levels [vocabulary], padded to an even number. A token's logprob is level * step + minimum. Logprobs
that are 16 or more below the highest logprob of the row are stored as the minimum."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.gguf.atomic_file import new_file

Float32 = NDArray[np.float32]

_MAGIC: Final = b"_logits_"
_HEAD: Final = struct.Struct("<Iii")
_SPREAD: Final = 16.0
_LEVELS: Final = 65535
_LEAST: Final = -100.0
_MOST: Final = 0.1
"""`_LEAST` and `_MOST` are the minimum and maximum of valid logprobs in a file."""
_MOST_TOKENS: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class LogitsShape:
    context: int  # Number of tokens in a chunk.
    vocabulary: int
    chunks: int

    @property
    def first(self) -> int:
        return self.context // 2

    @property
    def rows(self) -> int:
        """The number of rows of logits per chunk. The last position has no row, because no token follows it."""
        return self.context - 1 - self.first

    @property
    def row_bytes(self) -> int:
        return 8 + 2 * (self.vocabulary + self.vocabulary % 2)

    @property
    def head_bytes(self) -> int:
        return len(_MAGIC) + _HEAD.size + 4 * self.context * self.chunks

    @property
    def total_bytes(self) -> int:
        return self.head_bytes + self.chunks * self.rows * self.row_bytes


class LogitsWriter:
    def __init__(self, file: BinaryIO, shape: LogitsShape, chunks: Sequence[Sequence[int]]) -> None:
        self._file = file
        self._row_numbers = shape.row_bytes // 2
        file.write(_MAGIC + _HEAD.pack(shape.context, shape.vocabulary, shape.chunks))
        file.write(np.array(chunks, "<i4").tobytes())

    def add(self, logits: Float32) -> None:
        rows, vocabulary = logits.shape
        packed = np.zeros((rows, self._row_numbers), "<u2")
        step, least, numbers = _coded(logits)
        packed[:, :4] = np.stack([step, least], axis=1).astype("<f4").view("<u2")
        packed[:, 4 : 4 + vocabulary] = numbers
        self._file.write(packed.tobytes())


@contextmanager
def writing(path: Path, shape: LogitsShape, chunks: Sequence[Sequence[int]]) -> Iterator[LogitsWriter]:
    """Yields a writer. The file is renamed to `path` when it is complete. Raises UsageError if the disk lacks space."""
    with new_file(path, shape.total_bytes, advice="; take fewer --chunks") as file:
        yield LogitsWriter(file, shape, chunks)


@dataclass(frozen=True, slots=True)
class LogitsFile:
    path: Path
    shape: LogitsShape
    chunks: tuple[tuple[int, ...], ...]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens a file. Raises UsageError if the file cannot be read, is of another kind or is incomplete."""
        try:
            with path.open("rb") as file:
                shape = _read_shape(path, file)
                tokens = np.frombuffer(file.read(4 * shape.context * shape.chunks), "<i4")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
        if not (tokens.min() >= 0 and tokens.max() < shape.vocabulary):
            raise UsageError(f"{path}: has a token outside its vocabulary of {shape.vocabulary}; create the file again")
        return cls(path, shape, tuple(tuple(chunk) for chunk in tokens.reshape(shape.chunks, -1).tolist()))

    def logprobs(self, chunk: int, start: int, end: int) -> Float32:
        """Returns the stored logprobs [end - start, vocabulary] of rows [start, end) of a chunk."""
        shape = self.shape
        with self.path.open("rb") as file:
            file.seek(shape.head_bytes + (chunk * shape.rows + start) * shape.row_bytes)
            data = file.read((end - start) * shape.row_bytes)
        if len(data) != (end - start) * shape.row_bytes:
            raise LlamaclustError(f"{self.path}: became shorter while it was read; create the file again")
        numbers = np.frombuffer(data, "<u2").reshape(end - start, -1)
        scale = np.ascontiguousarray(numbers[:, :4]).view("<f4").astype(np.float32)
        step, least = scale.T.astype(np.float64)
        if not ((step >= 0) & (least > _LEAST) & (least + _LEVELS * step < _MOST)).all():
            raise UsageError(f"{self.path}: chunk {chunk} has values that are not logprobs; create the file again")
        logprobs = numbers[:, 4 : 4 + shape.vocabulary].astype(np.float32)
        logprobs *= scale[:, :1]
        logprobs += scale[:, 1:]
        return logprobs


def _read_shape(path: Path, file: BinaryIO) -> LogitsShape:
    head = file.read(len(_MAGIC) + _HEAD.size)
    if len(head) < len(_MAGIC) + _HEAD.size or not head.startswith(_MAGIC):
        raise UsageError(
            f"{path}: not a file of logits; to write one, give --kl-divergence-base {path} without --kl-divergence"
        )
    shape = LogitsShape(*_HEAD.unpack(head[len(_MAGIC) :]))
    if not (4 <= shape.context <= _MOST_TOKENS and shape.vocabulary > 0 and shape.chunks > 0):
        sizes = f"{shape.chunks} chunks of {shape.context} tokens, vocabulary {shape.vocabulary}"
        raise UsageError(f"{path}: the file's sizes are invalid: {sizes}")
    size = os.fstat(file.fileno()).st_size
    if size != shape.total_bytes:
        raise UsageError(f"{path}: expected {shape.total_bytes} bytes, found {size}; the file is incomplete")
    return shape


def _coded(logits: Float32) -> tuple[Float32, Float32, NDArray[np.uint16]]:
    most = logits.max(axis=1)
    least = np.maximum(logits.min(axis=1), most - np.float32(_SPREAD))
    step = (most - least) / np.float32(_LEVELS)
    total = np.log(np.exp(logits - most[:, None]).sum(axis=1, dtype=np.float64)).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(step > 0, np.float32(1) / step, np.float32(0)).astype(np.float32)
    numbers = np.rint((logits - least[:, None]) * inverse[:, None])
    return step, least - most - total, np.clip(numbers, 0, _LEVELS).astype(np.uint16)
