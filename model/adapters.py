"""Reads and checks LoRA adapters from GGUF files or PEFT folders, and adds them to programs. The tensors of adapter 0
have names such as `adapter.0.blk.3.attn_q.weight.lora_a`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from types import MappingProxyType

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import MAX_ADAPTER_RANK, MAX_ADAPTERS
from llamaclust.model.checkpoints.peft_adapter import is_peft, peft_files, read_peft
from llamaclust.model.gguf.header import read_header
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.values import MetadataValue, fail_at, shown
from llamaclust.model.program import Adapt, MatMul, Program, Step
from llamaclust.model.quant_types import QuantType

_KEY = "llamaclust.adapter."
_PREFIX = "adapter."
_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)
_NAME = re.compile(r"(?P<weight>blk\.\d+\.\w+\.weight)\.lora_(?P<half>[ab])")
_MOST = 65504.0
"""The largest accepted absolute weight, which is the largest finite F16 number."""
_READ_BYTES = 1 << 22
_SAMPLE_BYTES = 4096
_OTHER = "convert this model's adapter with llama.cpp's convert_lora_to_gguf.py"


def is_adapter(path: Path) -> bool:
    return path.is_file() or is_peft(path)


def adapter_files(path: Path) -> tuple[Path, ...]:
    return peft_files(path) if is_peft(path) else (path,)


def read_adapter(path: Path, model: ModelFile) -> ModelFile:
    """Reads a LoRA adapter. Its identity is a hash of the header and of the first and last bytes of every tensor.
    Raises ModelFileError if the file is invalid."""
    header = read_peft(path, model) if is_peft(path) else read_header(path)
    hashed = sha256(header.digest)
    for tensor in header.tensors.values():
        for start in sorted({0, max(0, tensor.n_bytes - _SAMPLE_BYTES)}):
            hashed.update(tensor.read_range(start, min(start + _SAMPLE_BYTES, tensor.n_bytes)))
    size_bytes, metadata, tensors = header.file_identity.size_bytes, header.metadata, header.tensors
    return ModelFile(path, (header.path,), size_bytes, hashed.hexdigest(), metadata, tensors)


def with_adapters(model: ModelFile, adapters: Mapping[int, ModelFile]) -> ModelFile:
    """Returns the model with the tensors of `adapters` added. Raises ModelFileError if an adapter is not a LoRA adapter
    or is made for another architecture."""
    if not adapters:
        return model
    if max(adapters) >= MAX_ADAPTERS:
        raise ModelFileError(f"{max(adapters) + 1} adapters exceed the limit of {MAX_ADAPTERS}; remove some")
    metadata, tensors = dict(model.metadata), dict(model.tensors)
    for number, adapter in sorted(adapters.items()):
        metadata[f"{_KEY}{number}.alpha"] = _alpha(adapter, model)
        for tensor in adapter.tensors.values():
            name = f"{_PREFIX}{number}.{_checked(tensor)}"
            tensors[name] = replace(tensor, name=name)
    return replace(
        model,
        parts=(*model.parts, *(part for adapter in adapters.values() for part in adapter.parts)),
        size_bytes=model.size_bytes + sum(adapter.size_bytes for adapter in adapters.values()),
        metadata=MappingProxyType(metadata),
        tensors=MappingProxyType(tensors),
    )


def check_adapter_weights(adapters: Iterable[ModelFile]) -> None:
    """Reads all weights of the adapters. Raises ModelFileError if a weight is not finite or is too large for F16."""
    for tensor in (tensor for adapter in adapters for tensor in adapter.tensors.values()):
        for start in range(0, tensor.n_bytes, _READ_BYTES):
            largest = _largest(tensor, start, min(start + _READ_BYTES, tensor.n_bytes))
            if not isfinite(largest) or largest > _MOST:
                what = f"has a weight of {largest:g}; the limit is {_MOST:g}"
                raise fail_at(tensor.path, f"tensor {shown(tensor.name)}", what, _OTHER)


def _largest(tensor: Tensor, start: int, end: int) -> float:
    """Returns the largest absolute weight in the bytes [start, end), or NaN if a weight is NaN."""
    data = tensor.read_range(start, end)
    # The bits of absolute values have the same order as the values, with NaN last.
    match tensor.quant_type:
        case QuantType.F32:
            return float((np.frombuffer(data, "<u4") & np.uint32(0x7FFF_FFFF)).max().view(np.float32))
        case QuantType.F16:
            return float((np.frombuffer(data, "<u2") & np.uint16(0x7FFF)).max().view(np.float16))
        case _:
            largest = (np.frombuffer(data, "<u2") & np.uint16(0x7FFF)).max()
            return float((np.uint32(largest) << np.uint32(16)).view(np.float32))


def _alpha(found: ModelFile, model: ModelFile) -> MetadataValue:
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (value := found.metadata_str(key, "none")) != wanted:
            raise found.error(
                key, f"expected {wanted!r}, found {shown(value)}", "give a LoRA adapter in GGUF or PEFT's format"
            )
    architecture, own = found.metadata_str("general.architecture"), model.metadata_str("general.architecture")
    if architecture != own:
        raise found.error(
            "general.architecture", f"expected the model's architecture {own!r}, found {shown(architecture)}", _OTHER
        )
    if "adapter.alora.invocation_tokens" in found.metadata:
        what = "adapters that certain tokens activate (aLoRA) are not supported"
        raise found.error("adapter.alora.invocation_tokens", what, "remove the adapter from `adapters`")
    if not found.tensors:
        raise fail_at(found.path, "tensors", "the adapter has no tensors", _OTHER)
    return found.metadata_float("adapter.lora.alpha", minimum=0.0, maximum=1e6)


def _checked(tensor: Tensor) -> str:
    name = _NAME.fullmatch(tensor.name)
    place = f"tensor {shown(tensor.name)}"
    if name is None:
        what = "only lora_a and lora_b tensors of the layers' matrices are supported"
        raise fail_at(tensor.path, place, what, "remove the adapter, or merge it with `llamaclust model merge-lora`")
    if tensor.quant_type not in _TYPES:
        known = ", ".join(kind.name for kind in _TYPES)
        raise fail_at(tensor.path, place, f"expected type {known}, found {tensor.quant_type.name}", _OTHER)
    if len(tensor.shape) != 2:
        raise fail_at(tensor.path, place, f"expected a matrix, found shape {list(tensor.shape)}", _OTHER)
    rank = tensor.shape[0 if name["half"] == "a" else 1]
    if not 1 <= rank <= MAX_ADAPTER_RANK:
        raise fail_at(tensor.path, place, f"expected a rank of 1 to {MAX_ADAPTER_RANK}, found {rank}", _OTHER)
    return tensor.name


def _numbers(model: ModelFile) -> tuple[int, ...]:
    return tuple(number for number in range(MAX_ADAPTERS) if f"{_KEY}{number}.alpha" in model.metadata)


def adapted(program: Program, model: ModelFile) -> Program:
    """Returns the program with an added `Adapt` step for each MatMul step that an adapter changes. Raises
    ModelFileError if tensor shapes do not match."""
    numbers = _numbers(model)
    return replace(program, steps=tuple(_adapted(program.steps, model, numbers))) if numbers else program


def _adapted(steps: Sequence[Step], model: ModelFile, numbers: Sequence[int]) -> Iterator[Step]:
    group: list[MatMul] = []
    for step in (*steps, None):
        if group and not (isinstance(step, MatMul) and step.x == group[0].x):
            for number in numbers:
                yield from (found for product in group if (found := _adapt(product, model, number)) is not None)
            group = []
        if isinstance(step, MatMul):
            group.append(step)
        if step is not None:
            yield step


def _adapt(product: MatMul, model: ModelFile, number: int) -> Adapt | None:
    down, up = (model.tensors.get(f"{_PREFIX}{number}.{product.weight}.lora_{half}") for half in "ab")
    if down is None and up is None:
        return None
    if down is None or up is None:
        present, missing = (up, "lora_a") if down is None else (down, "lora_b")
        assert present is not None
        raise fail_at(present.path, f"tensor {shown(present.name)}", f"it has no matching {missing} tensor", _OTHER)
    rank = down.shape[0]
    for tensor, wanted in ((down, (rank, product.x.width)), (up, (product.out.width, rank))):
        if tensor.shape != wanted:
            what = f"expected shape {list(wanted)}, found {list(tensor.shape)}"
            raise fail_at(tensor.path, f"tensor {shown(tensor.name)}", what, _OTHER)
    alpha = model.metadata_float(f"{_KEY}{number}.alpha", minimum=0.0, maximum=1e6)
    return Adapt(product.x, product.out, number, down.name, up.name, rank, alpha / rank if alpha else 1.0)


def own_names(names: Iterable[str], number: int | None) -> list[str]:
    """Returns the tensor names of adapter `number`, without the prefix `adapter.N.`. If `number` is None, returns the
    names of the model's own tensors."""
    if number is None:
        return [name for name in names if not name.startswith(_PREFIX)]
    prefix = f"{_PREFIX}{number}."
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def unread_adapter_tensor(model: ModelFile, names: set[str]) -> ModelFileError | None:
    name = min((name for name in names if name.startswith(_PREFIX)), default=None)
    if name is None:
        return None
    what = "the model has no matrix product with this weight that an adapter can change"
    return fail_at(model.tensor(name).path, f"tensor {shown(name)}", what, _OTHER)
