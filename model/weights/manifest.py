"""Manifests: models, adapters and projectors without weights, written as GGUF files without tensors. A manifest has the
metadata that a worker needs, and the type, shape and SHA-256 of each tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llamaclust.model.gguf.header import MAX_DIMENSIONS, MAX_ELEMENTS, MAX_TENSORS, read_header
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import FileIdentity, Tensor
from llamaclust.model.gguf.values import LazyStrings, MetadataValue, fail_at
from llamaclust.model.gguf.writer import WritableValue, header_bytes
from llamaclust.model.hyperparameters import PROJECTOR_ARCHITECTURE
from llamaclust.model.model_keys import read_architecture, read_hyperparameters
from llamaclust.model.quant_types import QuantType

MANIFEST_VERSION = 2
_PREFIX = "llamaclust.manifest."
_TOKENIZER = "tokenizer.ggml."
_HASH = re.compile("[0-9a-f]{64}")
_READ_BYTES = 1 << 23
_NOWHERE = FileIdentity(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    content: str  # SHA-256 of the tensor's bytes, in hex.

    @property
    def n_bytes(self) -> int:
        return self.quant_type.tensor_bytes(self.shape)


@dataclass(frozen=True, slots=True)
class Manifest:
    model_id: str
    size_bytes: int
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorRecord, ...]

    def file(self, path: Path, held: Mapping[str, tuple[Path, FileIdentity]]) -> ModelFile:
        """Returns the model as a ModelFile whose errors name `path`. `held` has the files of tensors, by SHA-256."""
        tensors = {}
        for record in self.tensors:
            place, identity = held.get(record.content, (path, _NOWHERE))
            tensors[record.name] = Tensor(
                record.name, record.quant_type, record.shape, place, 0, record.n_bytes, identity, record.content
            )
        return ModelFile(path, (), self.size_bytes, self.model_id, self.metadata, MappingProxyType(tensors))


def make_manifest(
    file: ModelFile, progress: Callable[[int], None] = lambda n_bytes: None, threads: int | None = None
) -> bytes:
    """Returns a model's manifest. Reads the whole model, about a gigabyte per second and thread. `progress` gets the
    size of each piece, and is called by several threads. Raises the errors of `Tensor.read`."""
    tensors = list(file.tensors.values())
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, "hash-weights") as pool:
        contents = list(pool.map(partial(content_of, progress=progress), tensors))
    return header_bytes(_own_metadata(file) | _table(file, tensors, contents))


def content_of(tensor: Tensor, progress: Callable[[int], None] = lambda n_bytes: None) -> str:
    hashed = sha256()
    buffer = memoryview(bytearray(min(_READ_BYTES, tensor.n_bytes)))
    for start in range(0, tensor.n_bytes, _READ_BYTES):
        piece = buffer[: min(_READ_BYTES, tensor.n_bytes - start)]
        tensor.read_into(piece, start)
        hashed.update(piece)
        progress(len(piece))
    return hashed.hexdigest()


def _own_metadata(file: ModelFile) -> dict[str, WritableValue]:
    architecture, is_adapter = read_architecture(file), "adapter.type" in file.metadata
    kept = ("adapter.", "general.type") if is_adapter else (f"{architecture}.", _TOKENIZER)
    is_model = not is_adapter and architecture != PROJECTOR_ARCHITECTURE
    own: dict[str, WritableValue] = {"general.architecture": architecture}
    for key, value in file.metadata.items():
        if key.startswith(kept):
            own[key] = np.float64(value) if isinstance(value, float) else value
    if is_model:
        own[f"{architecture}.vocab_size"] = read_hyperparameters(file).vocabulary_size
    return own


def _table(file: ModelFile, tensors: Sequence[Tensor], contents: Sequence[str]) -> dict[str, WritableValue]:
    columns: dict[str, WritableValue] = {
        "version": MANIFEST_VERSION,
        "model_id": file.identity,
        "size": np.uint64(file.size_bytes),
        "names": [tensor.name for tensor in tensors],
        "types": np.array([int(tensor.quant_type) for tensor in tensors], np.uint32),
        "dimensions": np.array([len(tensor.shape) for tensor in tensors], np.uint32),
        "sizes": np.array([size for tensor in tensors for size in tensor.shape], np.uint64),
        "contents": list(contents),
    }
    return {_PREFIX + name: column for name, column in columns.items()}


def read_manifest(path: Path) -> Manifest:
    metadata = read_header(path).metadata
    own = {key: value for key, value in metadata.items() if not key.startswith(_PREFIX)}
    try:
        return _manifest(metadata, MappingProxyType(own))
    except (ValueError, OverflowError) as error:
        raise fail_at(
            path, "manifest", str(error), "another version of llamaclust made the manifest, or it is damaged"
        ) from error


def _manifest(metadata: Mapping[str, MetadataValue], own: Mapping[str, MetadataValue]) -> Manifest:

    def column(name: str, kind: type) -> Any:
        value = metadata.get(_PREFIX + name)
        if not isinstance(value, kind):
            raise ValueError(f"{name} is missing")
        return value

    def numbers(name: str) -> list[int]:
        values = column(name, np.ndarray)
        if values.dtype.kind != "u":
            raise ValueError(f"{name} must be whole numbers")
        return [int(value) for value in values]

    if column("version", int) != MANIFEST_VERSION:
        raise ValueError(f"expected version {MANIFEST_VERSION}")
    names, contents = list(column("names", LazyStrings)), list(column("contents", LazyStrings))
    kinds, dimensions, sizes = numbers("types"), numbers("dimensions"), numbers("sizes")
    if not len(names) == len(contents) == len(kinds) == len(dimensions) == len(set(names)) <= MAX_TENSORS:
        raise ValueError("the columns have different lengths, or a name occurs twice")
    if any(not 1 <= count <= MAX_DIMENSIONS for count in dimensions) or sum(dimensions) != len(sizes):
        raise ValueError("the columns `dimensions` and `sizes` do not match")
    rest = iter(sizes)
    shapes = [tuple(islice(rest, count)) for count in dimensions]
    tensors = tuple(map(_record, names, kinds, shapes, contents))
    return Manifest(column("model_id", str), column("size", int), own, tensors)


def _record(name: str, kind: int, shape: tuple[int, ...], content: str) -> TensorRecord:
    quant_type = QuantType(kind)
    if 0 in shape or prod(shape) > MAX_ELEMENTS or shape[-1] % quant_type.info.block_size:
        raise ValueError(f"tensor {name!a}: shape {list(shape)} is not possible")
    if not _HASH.fullmatch(content):
        raise ValueError(f"tensor {name!a}: SHA-256 is missing")
    return TensorRecord(name, quant_type, shape, content)
