"""Writes checkpoints in the formats of other programs: safetensors, PyTorch's zip files, Hugging Face folders."""

from __future__ import annotations

import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.checkpoints.storage import Storage
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.stream import encoded

Arrays = Mapping[str, NDArray[Any]]
_SAFE_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "uint8": "F8_E4M3",
    "int64": "I64",
    "int32": "I32",
}
_BYTES = ("_blocks", "_scales")
"""Suffixes of tensors whose uint8 values are bytes, as in gpt-oss; other uint8 values are 8-bit floats."""
_TORCH_TYPES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "uint16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
}


def stored_as(values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Converts float32 to f32, f16 or bf16 (the latter as uint16)."""
    if kind != "bf16":
        return values.astype({"f32": np.float32, "f16": np.float16}[kind])
    data = encoded(values, Storage.F32, QuantType.BF16, "x")
    return np.frombuffer(data, np.uint16).reshape(values.shape)


def safetensors_bytes(tensors: Arrays) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, values in tensors.items():
        end = at + values.nbytes
        kind = "U8" if name.endswith(_BYTES) and values.dtype == np.uint8 else _SAFE_TYPES[values.dtype.name]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in tensors.values())


def write_hugging_face(
    folder: Path, config: Mapping[str, Any], tensors: Arrays, *, shards: int = 1, torch: bool = False
) -> Path:
    """Writes config.json and weights; several `shards` get an index file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("pytorch_model", "bin") if torch else ("model", "safetensors")
    names = [f"{stem}-{n + 1:05}-of-{shards:05}.{suffix}" if shards > 1 else f"{stem}.{suffix}" for n in range(shards)]
    parts = [{key: tensors[key] for key in list(tensors)[number::shards]} for number in range(shards)]
    for name, part in zip(names, parts, strict=True):
        if torch:
            write_torch(folder / name, part)
        else:
            (folder / name).write_bytes(safetensors_bytes(part))
    if shards > 1:
        places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@dataclass(frozen=True)
class _Storage:
    key: str
    kind: str
    count: int


class _Pickler(pickle._Pickler):
    """Pickles as torch.save does, with stand-ins for PyTorch's classes."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", getattr(sys.modules["torch"], value.kind), value.key, "cpu", value.count)
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _Tensor):
            rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
            return rebuild, (value.storage, value.offset, value.shape, value.stride, False, OrderedDict())
        return NotImplemented


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@contextmanager
def _pretended_torch() -> Iterator[None]:
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in _TORCH_TYPES.values():
        setattr(torch, kind, type(kind, (), {"__module__": "torch", "__qualname__": kind}))

    def rebuild() -> None:
        pass

    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = ("torch._utils", *["_rebuild_tensor_v2"] * 2)
    utils._rebuild_tensor_v2 = rebuild  # type: ignore[attr-defined]
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        yield
    finally:
        del sys.modules["torch"], sys.modules["torch._utils"]


def write_torch(path: Path, tensors: Arrays, *, compression: int = zipfile.ZIP_STORED) -> None:
    """Writes a state dict as torch.save does; arrays in column-major order (`order="F"`) become strided views."""
    members: dict[str, bytes] = {}
    state: OrderedDict[str, Any] = OrderedDict()
    for number, (name, values) in enumerate(tensors.items()):
        flat = values if values.flags.c_contiguous else values.T
        members[f"archive/data/{number}"] = np.ascontiguousarray(flat).tobytes()
        storage = _Storage(str(number), _TORCH_TYPES[values.dtype.name], values.size)
        stride = tuple(step // values.itemsize for step in values.strides)
        state[name] = _Tensor(storage, 0, values.shape, stride)
    data = io.BytesIO()
    with _pretended_torch():
        _Pickler(data, protocol=2).dump(state)
    write_archive(path, {"archive/data.pkl": data.getvalue(), "archive/version": b"3\n", **members}, compression)


def write_archive(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
