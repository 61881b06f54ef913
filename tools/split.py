"""Splits a model file into parts, and merges parts. Tensors are unchanged. The format of parts is llama.cpp's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.header import DEFAULT_ALIGNMENT, raw_metadata
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import Contents, RawValue, TensorSource, WritableValue, header_bytes, write_gguf_parts
from llamaclust.tools.progress import ByteProgress, Progress

DEFAULT_TENSORS: Final = 128
_MOST_PARTS: Final = (1 << 16) - 1
_PIECE_BYTES: Final = 1 << 24
_SPLIT_KEYS: Final = re.compile(r"split\.(no|count|tensors\.count)")


@dataclass(frozen=True, slots=True)
class SplitRules:
    """Limits of a part. If `most_bytes` is None, `most_tensors` limits the number of tensors."""

    most_bytes: int | None = None
    most_tensors: int = DEFAULT_TENSORS
    no_tensor_first: bool = False  # True if the first part has only metadata.


@dataclass(frozen=True, slots=True)
class Part:
    path: Path
    metadata: dict[str, WritableValue]
    tensors: tuple[Tensor, ...]
    alignment: int

    @property
    def n_bytes(self) -> int:
        sources = [TensorSource(tensor.name, tensor.quant_type, tensor.shape, bytes) for tensor in self.tensors]
        tensors = sum(-(-tensor.n_bytes // self.alignment) * self.alignment for tensor in self.tensors)
        return len(header_bytes(self.metadata, sources, self.alignment)) + tensors


def plan_split(model: ModelFile, prefix: Path, rules: SplitRules) -> list[Part]:
    """Returns the parts PREFIX-00001-of-0000N.gguf. Raises UsageError if the model is already split, if a tensor is
    larger than a part may be, or if there are too many parts."""
    if len(model.parts) > 1:
        raise UsageError(f"{model.path} is already split; merge it first with `llamaclust model merge`")
    alignment = _alignment(model)
    groups = _groups(list(model.tensors.values()), rules, alignment)
    if len(groups) > _MOST_PARTS:
        raise UsageError(
            f"{len(groups)} parts exceed the limit of {_MOST_PARTS}: raise --split-max-size or --split-max-tensors"
        )
    whole = _whole_metadata(model)
    parts = []
    for number, tensors in enumerate(groups):
        split: dict[str, WritableValue] = {
            "split.no": np.uint16(number),
            "split.tensors.count": np.int32(len(model.tensors)),
            "split.count": np.uint16(len(groups)),
        }
        aligned: dict[str, WritableValue] = {"general.alignment": np.uint32(alignment)}
        others = aligned if alignment != DEFAULT_ALIGNMENT else {}
        path = prefix.with_name(f"{prefix.name}-{number + 1:05}-of-{len(groups):05}.gguf")
        parts.append(Part(path, (whole if number == 0 else others) | split, tuple(tensors), alignment))
    return parts


def plan_merge(model: ModelFile, out: Path) -> Part:
    """Plans the merge of a split model into the file `out`. Raises UsageError if the model is already one file."""
    if len(model.parts) == 1:
        raise UsageError(f"{model.path} is already one file, so there is nothing to merge")
    return Part(out, _whole_metadata(model), tuple(model.tensors.values()), _alignment(model))


def write_parts(parts: Sequence[Part], progress: Progress) -> None:
    """Writes all files or none. Raises UsageError if a file exists or the disk lacks space. `progress` receives file
    names and bytes."""
    for part in parts:
        if part.path.exists():
            raise UsageError(f"{part.path} already exists; delete it or choose another name")
    done = ByteProgress(progress, sum(tensor.n_bytes for part in parts for tensor in part.tensors))
    files = {}
    for part in parts:
        sources = [_source(tensor, partial(done.add, part.path.name)) for tensor in part.tensors]
        files[part.path] = Contents.of(part.metadata, sources)
    write_gguf_parts(files)


def _source(tensor: Tensor, on_read: Callable[[int], None]) -> TensorSource:
    def pieces() -> Iterator[bytes]:
        for start in range(0, tensor.n_bytes, _PIECE_BYTES):
            piece = tensor.read_range(start, min(start + _PIECE_BYTES, tensor.n_bytes))
            on_read(len(piece))
            yield piece

    return TensorSource(tensor.name, tensor.quant_type, tensor.shape, pieces)


def _whole_metadata(model: ModelFile) -> dict[str, WritableValue]:
    """Returns all metadata except the keys of a split."""
    raw: dict[str, WritableValue] = {
        key: RawValue(data) for key, data in raw_metadata(model.path).items() if not _SPLIT_KEYS.fullmatch(key)
    }
    if "general.alignment" in raw:
        raw["general.alignment"] = np.uint32(_alignment(model))
    return raw


def _alignment(model: ModelFile) -> int:
    return model.metadata_int("general.alignment", DEFAULT_ALIGNMENT)


def _groups(tensors: Sequence[Tensor], rules: SplitRules, alignment: int) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[], []] if rules.no_tensor_first else [[]]
    held = 0
    for number, tensor in enumerate(tensors):
        size = -(-tensor.n_bytes // alignment) * alignment
        if rules.most_bytes is None:
            begins = number > 0 and number % rules.most_tensors == 0
        elif size > rules.most_bytes:
            raise UsageError(
                f"tensor {tensor.name} has {size} bytes, but a part holds {rules.most_bytes}: raise --split-max-size"
            )
        else:
            begins = held + size > rules.most_bytes
        if begins:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += size
    return groups
