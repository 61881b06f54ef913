"""The `llamaclust model cache` commands: list and clear packed weights, fetched weights, GPU kernels and KV memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from llamaclust.cli.options import Json
from llamaclust.cli.terminal import printable
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.sizes import MIB

if TYPE_CHECKING:
    from llamaclust.core.disk_cache.cache import CachedFile, DiskCache
    from llamaclust.kernels.cuda.runtime.cubin_cache import KernelFolder
    from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
    from llamaclust.model.weights.cache import WeightCache
    from llamaclust.worker.kv_disk.folder import KvFolder


def list_layers(as_json: Json = False) -> None:
    """List the packed weights of each model, the weights fetched from other workers, KV memory on disk and GPU kernels.

    A model's packed weights have several parts: each layer, the embedding and the output matrix."""
    from llamaclust.core.disk_cache.files import TEMPORARY
    from llamaclust.model.weights.cache import UNFINISHED, WHOLE

    caches = packed, weights, kv, kernels = _caches()
    with _named(packed, "listed"):
        models = packed.list_models()
    unfinished = [file for cache in caches for file in _files(cache, TEMPORARY)]
    strange = [path for cache in caches for path in cache.in_the_way()]
    fetched, begun = _files(weights, WHOLE), _files(weights, UNFINISHED)
    blocks, compiled = _files(kv), _files(kernels)
    if as_json:
        held = {"folder": str(weights.path), "most_bytes": weights.most_bytes, "tensors": len(fetched)}
        listed = {
            "fetched": held | {"size_bytes": _total(fetched), "unfinished_bytes": _total(begun)},
            "models": [asdict(model) for model in models],
            "unfinished": {"files": len(unfinished), "size_bytes": _total(unfinished)},
            "in_the_way": [str(path) for path in strange],
            "kv_disk": {"folder": str(kv.path), "size_bytes": _total(blocks)},
            "kernels": {"files": len(compiled), "size_bytes": _total(compiled)},
        }
        print(json.dumps({"folder": str(packed.path), "most_bytes": packed.most_bytes, **listed}))
        return
    for model in models:
        print(f"{_mib(model.size_bytes)}  {model.parts:4} parts  {printable(model.model)}")
    if unfinished:
        why = "still being written, or left by a killed process; the next write to the cache deletes leftovers"
        print(f"{_mib(_total(unfinished))}  {len(unfinished):4} unfinished  ({why})")
    for path in strange:
        print(f"{printable(str(path))}: not a regular file; remove it")
    print(f"{_mib(_total(_files(packed)))} of {packed.most_bytes / MIB:,.2f} in {packed.path}")
    if fetched or begun:
        used = f"{_mib(_total([*fetched, *begun]))} of {weights.most_bytes / MIB:,.2f} in {weights.path}"
        print(f"{used}: weights fetched from other workers, {len(begun)} of them unfinished")
    if blocks:
        print(f"{_mib(_total(blocks))} in {kv.path}: KV memory of prompts (kv_disk)")
    if compiled:
        print(f"{_mib(_total(compiled))}  {len(compiled):4} files of kernels compiled for GPUs")


def clear(as_json: Json = False) -> None:
    """Delete packed layers, fetched weights, KV memory and compiled kernels. Running processes are not disturbed. The
    next start creates the files again."""
    caches = _caches()
    cleared = []
    for cache in caches:
        with _named(cache, "cleared"):
            cleared.append(cache.clear())
    packed, fetched, kv, kernels = cleared
    left = [error for each in cleared for error in each.left]
    if as_json:
        deleted = {"files": packed.files, "size_bytes": packed.size_bytes}
        deleted |= {"kernel_files": kernels.files, "kernel_bytes": kernels.size_bytes}
        deleted |= {"kv_files": kv.files, "kv_bytes": kv.size_bytes}
        deleted |= {"fetched_files": fetched.files, "fetched_bytes": fetched.size_bytes}
        print(json.dumps({"folder": str(caches[0].path), **deleted, "left": [error.filename for error in left]}))
    else:
        packed_in, fetched_in, kv_in, _ = (f"deleted in {cache.path}" for cache in caches)
        kinds = (packed_in, fetched_in, f"of KV memory {kv_in}", "of compiled kernels deleted")
        for each, kind in zip(cleared, kinds, strict=True):
            if each.files or each is packed:
                print(f"{each.files} files, {each.size_bytes / MIB:,.2f} MiB {kind}")
    if left:
        folders = (cache.path for cache, each in zip(caches, cleared, strict=True) if each.left)
        raise LlamaclustError(f"{next(folders)}: cannot be deleted: {'; '.join(map(_reason, left))}")


def _files(cache: DiskCache, *suffixes: str) -> list[CachedFile]:
    with _named(cache, "listed"):
        return cache.files(*suffixes)


def _total(files: Sequence[CachedFile]) -> int:
    return sum(file.size_bytes for file in files)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:10,.2f} MiB"


@contextmanager
def _named(cache: DiskCache, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LlamaclustError(f"{cache.path}: cannot be {what}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    what = (error.strerror or str(error)).lower()
    return what if error.filename is None else f"{printable(str(error.filename))}: {what}"


def _caches() -> tuple[PackedCacheFolder, WeightCache, KvFolder, KernelFolder]:
    from llamaclust.cluster.config.environment import environment
    from llamaclust.kernels.cuda.runtime.cubin_cache import KernelFolder
    from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
    from llamaclust.model.weights.cache import WeightCache
    from llamaclust.worker.kv_disk.folder import KvFolder

    given = environment()
    return (
        PackedCacheFolder(given.packed_cache_dir, given.packed_cache_bytes),
        WeightCache(given.weights_dir, given.weights_bytes),
        KvFolder(given.kv_disk_dir, 0),
        KernelFolder(given.kernels_dir),
    )
