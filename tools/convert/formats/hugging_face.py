"""Reads Hugging Face folders: config.json, and weights as safetensors or PyTorch files, whole or in shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.json_file import read_json
from llamaclust.model.checkpoints.safetensors import read_safetensors
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.formats.source_files import SourceFiles, lazy_tensor
from llamaclust.tools.convert.formats.torch_files import read_torch
from llamaclust.tools.convert.lazy import Lazy
from llamaclust.tools.convert.quantized import dequantized
from llamaclust.tools.convert.settings import Checkpoint

CONFIG: Final = "config.json"
_STEMS: Final = (("model", "safetensors"), ("pytorch_model", "bin"))
_SHARD: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<suffix>safetensors|bin)")
_FILE_NAME: Final = re.compile(r"(?!\.\.?$)[^/\\]{1,255}")


def read_folder(files: SourceFiles, folder: Path) -> Checkpoint:
    path = folder / CONFIG
    values = read_json(path)
    settings = Settings(values, str(path))
    tensors = read_weights(files, folder)
    return Checkpoint(
        family=_family(settings),
        settings=settings,
        tensors=dequantized(tensors, settings, files.recent),
        vocabulary=folder,
        name=_name(folder.resolve()),
    )


def _name(folder: Path) -> str:
    """Returns the folder's name. For models--OWNER--NAME/snapshots/HASH in Hugging Face's cache, returns NAME."""
    return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


def read_weights(files: SourceFiles, folder: Path) -> dict[str, Lazy]:
    for stem, suffix in _STEMS:
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _indexed(files, index)
        if (folder / f"{stem}.{suffix}").is_file():
            return read_weight_file(files, folder / f"{stem}.{suffix}")
    shards = sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if not shards:
        names = " or ".join(f"{stem}.{suffix}" for stem, suffix in _STEMS)
        raise ModelFileError(f"{folder} has no weights: expected {names}, or shards of such a file")
    return _all_shards(files, shards)


def read_weight_file(files: SourceFiles, path: Path) -> dict[str, Lazy]:
    file = files.open(path)
    if path.suffix != ".safetensors":
        return read_torch(file, files.recent)
    return {
        tensor.name: lazy_tensor(file, tensor.name, tensor.offset, tensor.shape, tensor.storage)
        for tensor in read_safetensors(file)
    }


def _indexed(files: SourceFiles, index: Path) -> dict[str, Lazy]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelFileError(f"{index}: weight_map is missing")
    shards: dict[str, dict[str, Lazy]] = {}
    found = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard) or not shard.isprintable():
            raise ModelFileError(f"{index}: {shown(name)} has the shard {shown(str(shard))}, which is not a file name")
        if shard not in shards:
            path = index.with_name(shard)
            if not path.is_file():
                raise ModelFileError(
                    f"{path}: the file is missing, but {index.name} lists it; get all shards of the model"
                )
            shards[shard] = read_weight_file(files, path)
        if name not in shards[shard]:
            raise ModelFileError(
                f"{index.with_name(shard)}: tensor {shown(name)} is missing, but {index.name} lists it"
            )
        found[name] = shards[shard][name]
    return found


def _all_shards(files: SourceFiles, shards: list[Path]) -> dict[str, Lazy]:
    names = [name for path in shards if (name := _SHARD.fullmatch(path.name))]
    first = names[0]
    wanted = [(first["stem"], number, int(first["count"])) for number in range(1, int(first["count"]) + 1)]
    if [(name["stem"], int(name["number"]), int(name["count"])) for name in names] != wanted:
        missing = f"expected {int(first['count'])} shards, found {len(names)}"
        raise ModelFileError(f"{shards[0].parent}: {missing} of {shown(first['stem'])}; get all shards of the model")
    found: dict[str, Lazy] = {}
    for path in shards:
        tensors = read_weight_file(files, path)
        twice = next((name for name in tensors if name in found), None)
        if twice is not None:
            raise ModelFileError(f"{path}: tensor {shown(twice)} is in another shard too")
        found |= tensors
    return found


def _family(settings: Settings) -> str:
    listed = settings.values.get("architectures")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise settings.error("architectures", "missing, so the architecture is unknown")
    return listed[0]
