"""`llamaclust model cache ...`: the packed-weight cache, fetched weights, compiled kernels and KV memory on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llamaclust.cli.options import Json
from llamaclust.cli.terminal import printable
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.sizes import MIB

if TYPE_CHECKING:
    from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
    from llamaclust.model.weights.cache import WeightCache
    from llamaclust.worker.kv_disk.folder import KvFolder


def list_layers(as_json: Json = False) -> None:
    """Show the packed-weight cache by model, weights fetched from workers, and KV memory on disk.

    A part is a layer, the embedding or the output matrix."""
    folder, weights, kernels_dir = _caches()
    with _named(f"{folder.path}: cannot be listed"):
        found, unfinished, strange = folder.list_models(), folder.unfinished_bytes(), folder.in_the_way()
        used_bytes = folder.used_bytes()
        fetched, begun = weights.list_files()
    kernels, kv_disk = _kernels(kernels_dir), _kv_disk()
    kv_bytes = kv_disk.used_bytes
    if as_json:
        held = {"folder": str(weights.path), "most_bytes": weights.most_bytes, "tensors": len(fetched)}
        listed = {
            "fetched": held | {"size_bytes": sum(fetched), "unfinished_bytes": sum(begun)},
            "models": [asdict(model) for model in found],
            "unfinished": {"files": len(unfinished), "size_bytes": sum(unfinished)},
            "in_the_way": [str(path) for path in strange],
            "kv_disk": {"folder": str(kv_disk.path), "size_bytes": kv_bytes},
            "kernels": {"files": len(kernels), "size_bytes": sum(kernels.values())},
        }
        print(json.dumps({"folder": str(folder.path), "most_bytes": folder.most_bytes, **listed}))
        return
    for model in found:
        print(f"{_mib(model.size_bytes)}  {model.parts:4} parts  {printable(model.model)}")
    if unfinished:
        why = "being written, or left by a process that was killed: the next one that writes deletes it"
        print(f"{_mib(sum(unfinished))}  {len(unfinished):4} unfinished  ({why})")
    for path in strange:
        print(f"in the way, as it is no regular file: {printable(str(path))}")
    print(f"{_mib(used_bytes)} of {folder.most_bytes / MIB:,.2f} in {folder.path}")
    if fetched or begun:
        used = f"{_mib(sum(fetched) + sum(begun))} of {weights.most_bytes / MIB:,.2f} in {weights.path}"
        print(f"{used}: weights fetched from other workers, {len(begun)} of them unfinished")
    if kv_bytes:
        print(f"{_mib(kv_bytes)} in {kv_disk.path}: KV memory of prompts (kv_disk)")
    if kernels:
        print(f"{_mib(sum(kernels.values()))}  {len(kernels):4} files of kernels compiled for GPUs")


def clear(as_json: Json = False) -> None:
    """Delete packed layers, fetched weights, KV memory and compiled kernels. Processes that use them go on; the next
    start makes them anew."""
    folder, weights, kernels_dir = _caches()
    with _named(f"{folder.path}: cannot be cleared"):
        cleared = folder.clear()
    with _named(f"{weights.path}: cannot be cleared"):
        fetched = weights.clear()
    kv_disk = _kv_disk()
    with _named(f"{kv_disk.path}: cannot be cleared"):
        kv_files, kv_bytes = kv_disk.clear()
    kernels = _kernels(kernels_dir)
    with _named("compiled kernels cannot be deleted"):
        for path in kernels:
            path.unlink(missing_ok=True)
    if as_json:
        deleted = {"files": cleared.files, "size_bytes": cleared.size_bytes}
        deleted |= {"kernel_files": len(kernels), "kernel_bytes": sum(kernels.values())}
        deleted |= {"kv_files": kv_files, "kv_bytes": kv_bytes}
        deleted |= {"fetched_files": fetched.files, "fetched_bytes": fetched.size_bytes}
        print(json.dumps({"folder": str(folder.path), **deleted, "left": [error.filename for error in cleared.left]}))
    else:
        print(f"{cleared.files} files, {cleared.size_bytes / MIB:,.2f} MiB deleted in {folder.path}")
        if fetched.files:
            print(f"{fetched.files} files, {fetched.size_bytes / MIB:,.2f} MiB deleted in {weights.path}")
        if kv_files:
            print(f"{kv_files} files, {kv_bytes / MIB:,.2f} MiB of KV memory deleted in {kv_disk.path}")
        if kernels:
            print(f"{len(kernels)} files, {sum(kernels.values()) / MIB:,.2f} MiB of compiled kernels deleted")
    if cleared.left:
        raise LlamaclustError(f"{folder.path}: cannot be deleted: {'; '.join(map(_reason, cleared.left))}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:10,.2f} MiB"


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LlamaclustError(f"{what}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    what = (error.strerror or str(error)).lower()
    return what if error.filename is None else f"{printable(str(error.filename))}: {what}"


def _caches() -> tuple[PackedCacheFolder, WeightCache, Path]:
    from llamaclust.cluster.config.environment import environment
    from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
    from llamaclust.model.weights.cache import WeightCache

    variables = environment()
    packed = PackedCacheFolder(variables.packed_cache_dir, variables.packed_cache_bytes)
    return packed, WeightCache(variables.weights_dir, variables.weights_bytes), variables.kernels_dir


def _kv_disk() -> KvFolder:
    from llamaclust.cluster.config.environment import environment
    from llamaclust.worker.kv_disk.folder import KvFolder

    return KvFolder(environment().kv_disk_dir, 0)


def _kernels(folder: Path) -> dict[Path, int]:
    """Files of kernels compiled for GPUs, and their bytes."""
    from llamaclust.kernels.cuda.runtime.cubin_cache import kernel_files

    with _named(f"{folder}: cannot be listed"):
        return {path: found.st_size for path, found in kernel_files(folder)}
