"""Damaged, hostile and unsupported model files, made from a tiny valid one."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from struct import pack

from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.gguf_bytes import F32, STRING, array, gguf, key, number, tensor
from support.models.tiny_model import build_tiny_model

HUGE = (1 << 64) - 1

NO_KERNELS = next(kind for kind in QuantType if kind.info.block_size == 32 and kind not in SUPPORTED_TYPES)
"""A quant type of files for which the CPU has no kernels (Q8_1, a type of activations)."""

HEADERS: dict[str, tuple[bytes, str]] = {
    "magic": (gguf(magic=b"GGML"), "not a GGUF file"),
    "tensors without end": (gguf(tensor_count=HUGE), f"{HUGE} tensors"),
    "array without end": (gguf([array("a", STRING, HUGE, bytes(64))]), f"an array of {HUGE} strings"),
    "value type": (gguf([key("a", 77, bytes(8))]), "unknown value type 77"),
    "zero dimension": (gguf([], [tensor("x", [4, 0])], bytes(64)), "shape [4, 0] contains 0, or has more than"),
    "overlap": (gguf([], [tensor("x", [16]), tensor("y", [16], F32, 32)], bytes(96)), "overlaps tensor 'x'"),
    "quant type": (gguf([], [tensor("x", [32], 4)], bytes(64)), "unknown quant type 4"),
}
"""Contents of files that are refused wherever a model is opened, each with a part of the error."""


def tiny(path: Path, **options: object) -> Path:
    """Writes a valid model of 4 layers, 0.4 MB."""
    return build_tiny_model(path, **{"hidden": 64, "layers": 4, "heads": 4, "ffn": 128, **options})  # type: ignore[arg-type]


def damaged_files(folder: Path, good: Path) -> dict[str, tuple[Path, str]]:
    """Writes files that are refused wherever a model is opened, and returns each with a part of the error."""
    data = good.read_bytes()
    found = {name: (content, says) for name, (content, says) in HEADERS.items()}
    found["data cut short"] = data[: len(data) // 2], "the file is incomplete"
    found["header cut short"] = data[:1500], "the file is damaged"
    files = {}
    for name, (content, says) in found.items():
        path = folder / f"{name}.gguf"
        path.write_bytes(content)
        files[name] = path, says
    return files | _no_files(folder) | _split_files(folder)


def _no_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Creates paths that are not readable files; opening the pipe must not block."""
    paths = {name: folder / f"{name}.gguf" for name in ("missing", "folder", "pipe", "loop of links")}
    paths["folder"].mkdir()
    os.mkfifo(paths["pipe"])
    paths["loop of links"].symlink_to(paths["loop of links"])
    return {name: (path, str(path)) for name, path in paths.items()}


def _split_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Writes first parts of two-part models whose second part is missing or links to the first."""
    keys = [("split.no", 0), ("split.count", 2), ("split.tensors.count", 2)]
    content = gguf([number(*pair) for pair in keys], [tensor("x", [16])], bytes(64))
    first, missing = _parts(folder, "missing")
    first.write_bytes(content)
    cyclic, second = _parts(folder, "cyclic")
    cyclic.write_bytes(content)
    second.symlink_to(cyclic)
    return {"missing part": (first, missing.name), "cyclic parts": (cyclic, second.name)}


def _parts(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}-00001-of-00002.gguf", folder / f"{name}-00002-of-00002.gguf"


def unusable_files(folder: Path, good: Path) -> dict[str, tuple[Path, str]]:
    """Writes intact files of models that cannot run, and returns each with a part of the error."""
    wrong: dict[str, tuple[dict[str, WritableValue], str]] = {
        "architecture": ({"general.architecture": "martian"}, "martian"),
        "layers as text": ({"llama.block_count": "four"}, "llama.block_count"),
        "layers without end": ({"llama.block_count": 1 << 31}, "llama.block_count"),
        "one layer more": ({"llama.block_count": 5}, "blk.4."),
        "no heads": ({"llama.attention.head_count": 0}, "llama.attention.head_count"),
        "another width": ({"llama.embedding_length": 128}, "token_embd.weight"),
    }
    files = {}
    for name, (extra, says) in wrong.items():
        files[name] = tiny(folder / f"{name}.gguf", extra=extra), says
    for name, kind in (("no kernels", NO_KERNELS), ("no vector type", QuantType.Q8_0)):
        files[name] = retyped(good, folder / f"{name}.gguf", kind, kind is not NO_KERNELS), kind.name
    return files


def retyped(good: Path, path: Path, kind: QuantType, vectors: bool) -> Path:
    """Writes the model with zeros of another type in all vectors if `vectors`, else in all matrices."""
    model = open_model(good)
    sources = []
    for one in model.tensors.values():
        source = TensorSource(one.name, one.quant_type, one.shape, one.read)
        if (len(one.shape) == 1) is vectors:
            n_bytes = one.rows * kind.info.row_bytes(one.shape[-1])
            source = TensorSource(one.name, kind, one.shape, partial(bytes, n_bytes))
        sources.append(source)
    write_gguf(path, model.metadata, sources)
    return path


def slow_to_load(path: Path, experts: int = 1024) -> Path:
    """Writes a sparse model file that is quick to make and slow to load."""
    few = open_model(tiny(path.with_suffix(".small.gguf"), experts=4, ffn=256))
    metadata = dict(few.metadata) | {"llama.expert_count": experts, "general.alignment": 1}
    write_gguf(path, metadata, [])
    keys = path.read_bytes()[len(_start(0, 0)) :]
    infos, offset = [], 0
    for one in few.tensors.values():
        shape = (experts, *one.shape[1:]) if "exps" in one.name or "inp" in one.name else one.shape
        infos.append(tensor(one.name, list(reversed(shape)), one.quant_type, offset))
        offset += one.n_bytes // one.shape[0] * shape[0]
    header = _start(len(infos), len(metadata)) + keys + b"".join(infos)
    path.write_bytes(header)
    os.truncate(path, len(header) + offset)
    return path


def _start(tensor_count: int, key_count: int) -> bytes:
    return b"GGUF" + pack("<IQQ", 3, tensor_count, key_count)
