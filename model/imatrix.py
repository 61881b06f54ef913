"""Importance matrices in both of llama.cpp's formats: the sums of squared inputs of each column of a weight matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, pack

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.atomic_file import new_file
from llamaclust.model.gguf.header import MAGIC
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import FileIdentity, open_regular, read_exactly
from llamaclust.model.gguf.values import shown, text_of
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType

Float32 = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_BYTES = 1 << 31
_MOST_NAME_BYTES = 255
_NUMBER = Struct("<i")


@dataclass(frozen=True, slots=True)
class Importance:
    """The importance of a matrix, or of each expert's matrix: sums of squares [experts, columns] over `counts`
    inputs."""

    sums: Float32
    counts: Float32

    @property
    def means(self) -> Float32:
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    entries: Mapping[str, Importance]
    chunks: int
    chunk_tokens: int
    datasets: tuple[str, ...]


def read_imatrix(path: Path) -> ImportanceMatrix:
    with open_regular(path) as descriptor:
        size_bytes = FileIdentity.of(descriptor).size_bytes
        if size_bytes > _MOST_BYTES:
            raise _no_matrix(path, f"the file has {size_bytes >> 20} MiB; the limit is {_MOST_BYTES >> 20} MiB")
        start = bytearray(min(size_bytes, len(MAGIC)))
        read_exactly(descriptor, path, 0, memoryview(start))
        if bytes(start) != MAGIC:
            data = bytearray(size_bytes)
            read_exactly(descriptor, path, 0, memoryview(data))
    matrix = _from_gguf(open_model(path)) if bytes(start) == MAGIC else _from_legacy(path, bytes(data))
    if not matrix.entries:
        raise _no_matrix(path, "the file has no entries")
    for name, entry in matrix.entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
            raise _no_matrix(path, f"{shown(name)} has values that are not numbers")
        if (entry.sums < 0).any() or (entry.counts < 0).any():
            raise _no_matrix(path, f"{shown(name)} has negative values")
    return matrix


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Writes the old format if the name ends in .dat, otherwise GGUF. The file is named `path` only when complete."""
    if path.suffix == ".dat":
        data = _legacy_bytes(matrix)
        with new_file(path, len(data)) as file:
            file.write(data)
        return
    metadata: dict[str, WritableValue] = {
        "general.type": "imatrix",
        "imatrix.datasets": list(matrix.datasets),
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_tokens,
    }
    sources = []
    for name, entry in sorted(matrix.entries.items()):
        sources.append(TensorSource(name + _SUMS, QuantType.F32, entry.sums.shape, entry.sums.tobytes))
        sources.append(TensorSource(name + _COUNTS, QuantType.F32, (len(entry.counts), 1), entry.counts.tobytes))
    write_gguf(path, metadata, sources)


def _from_gguf(file: ModelFile) -> ImportanceMatrix:
    found = text_of(file.metadata, "general.type")
    if found != "imatrix":
        raise _no_matrix(file.path, f"expected general.type 'imatrix', found {found!r:.40}")
    entries = {}
    for name in (name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)):
        sums, counts = file.tensor(name + _SUMS), file.tensor(name + _COUNTS)
        if sums.quant_type != QuantType.F32 or counts.quant_type != QuantType.F32 or counts.rows != sums.rows:
            raise _no_matrix(
                file.path, f"{shown(name)}: sums of shape {sums.shape} do not fit counts of shape {counts.shape}"
            )
        shape = (sums.rows, sums.shape[-1])
        entries[name] = Importance(
            np.frombuffer(sums.read(), "<f4").reshape(shape), np.frombuffer(counts.read(), "<f4")[: shape[0]]
        )
    names = file.metadata_strings("imatrix.datasets") if "imatrix.datasets" in file.metadata else ()
    chunks = file.metadata_int("imatrix.chunk_count", 0)
    return ImportanceMatrix(entries, chunks, file.metadata_int("imatrix.chunk_size", 0), tuple(names))


def _from_legacy(path: Path, data: bytes) -> ImportanceMatrix:
    """Reads the old format: the number of entries, the entries, the number of chunks, and the calibration text's
    name. Each entry has a name, a number of calls, and the mean squares multiplied by the number of calls."""
    at = 0

    def number() -> int:
        nonlocal at
        at += _NUMBER.size
        if at > len(data):
            raise _no_matrix(path, f"the file ends at byte {len(data)}, within an entry")
        return int(_NUMBER.unpack_from(data, at - _NUMBER.size)[0])

    def take(count: int, most: int) -> bytes:
        nonlocal at
        if not 0 < count <= min(most, len(data) - at):
            raise _no_matrix(path, f"the length {count} at byte {at - 4} does not fit in the file of {len(data)} bytes")
        at += count
        return data[at - count : at]

    entries: dict[str, Importance] = {}
    try:
        for _ in range(number()):
            name = take(number(), _MOST_NAME_BYTES).decode()
            calls = max(1, number())
            values = np.frombuffer(take(4 * number(), len(data)), "<f4")
            entries[name] = Importance(values[None], np.array([calls], np.float32))
        chunks = max(0, number()) if at < len(data) else 0
        datasets = (take(number(), len(data)).decode(errors="replace"),) if at < len(data) else ()
    except UnicodeDecodeError:
        raise _no_matrix(path, f"the name that ends at byte {at} is not valid UTF-8") from None
    return ImportanceMatrix(entries, chunks, 0, datasets)


def _legacy_bytes(matrix: ImportanceMatrix) -> bytes:
    out = pack("<i", len(matrix.entries))
    for name, entry in sorted(matrix.entries.items()):
        calls = max(1, -(-int(entry.counts.max()) // max(1, matrix.chunk_tokens)))
        values = (entry.means * np.float32(calls)).astype("<f4").tobytes()
        out += pack("<i", len(name.encode())) + name.encode() + pack("<ii", calls, len(values) // 4) + values
    text = (matrix.datasets[-1] if matrix.datasets else "").encode()
    return out + pack("<ii", matrix.chunks, len(text)) + text


def _no_matrix(path: Path, why: str) -> ModelFileError:
    return ModelFileError(f"{path}: not an importance matrix: {why}; make one with `llamaclust model imatrix`")
