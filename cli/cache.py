"""`llamaclust model cache ...`: the packed-weight cache, fetched weights and compiled kernels."""

from __future__ import annotations

import json
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


def list_layers(as_json: Json = False) -> None:
    """Show the packed-weight cache by model, and weights fetched from workers.

    A part is a layer, the embedding or the output matrix."""
    folder = _folder()
    try:
        found, unfinished, strange = folder.list_models(), folder.unfinished_bytes(), folder.in_the_way()
        used_bytes = folder.used_bytes()
        weights = _weights()
        fetched, begun = weights.list_files()
        kernels = _kernels()
    except OSError as error:
        raise LlamaclustError(f"{folder.path}: cannot be listed: {_reason(error)}") from error
    if as_json:
        models = [asdict(one) for one in found]
        left = {"files": len(unfinished), "size_bytes": sum(unfinished)}
        brought = {"folder": str(weights.path), "most_bytes": weights.most_bytes, "tensors": len(fetched)}
        brought |= {"size_bytes": sum(fetched), "unfinished_bytes": sum(begun)}
        listed = {
            "fetched": brought,
            "models": models,
            "unfinished": left,
            "in_the_way": [str(path) for path in strange],
            "kernels": {"files": len(kernels), "size_bytes": sum(kernels.values())},
        }
        print(json.dumps({"folder": str(folder.path), "most_bytes": folder.most_bytes, **listed}))
        return
    for one in found:
        print(f"{one.size_bytes / MIB:10,.2f} MiB  {one.parts:4} parts  {printable(one.model)}")
    if unfinished:
        why = "being written, or left by a process that was killed: the next one that writes deletes it"
        print(f"{sum(unfinished) / MIB:10,.2f} MiB  {len(unfinished):4} unfinished  ({why})")
    for path in strange:
        print(f"in the way, as it is no regular file: {printable(str(path))}")
    print(f"{used_bytes / MIB:10,.2f} MiB of {folder.most_bytes / MIB:,.2f} in {folder.path}")
    if fetched or begun:
        held = f"{(sum(fetched) + sum(begun)) / MIB:10,.2f} MiB of {weights.most_bytes / MIB:,.2f} in {weights.path}"
        print(f"{held}: weights fetched from other workers, {len(begun)} of them unfinished")
    if kernels:
        print(f"{sum(kernels.values()) / MIB:10,.2f} MiB  {len(kernels):4} files of kernels compiled for GPUs")


def clear(as_json: Json = False) -> None:
    """Delete packed layers, fetched weights and compiled kernels. Processes that use them go on; the next start makes
    them anew."""
    folder, weights = _folder(), _weights()
    try:
        cleared = folder.clear()
    except OSError as error:
        raise LlamaclustError(f"{folder.path}: cannot be cleared: {_reason(error)}") from error
    try:
        brought = weights.clear()
    except OSError as error:
        raise LlamaclustError(f"{weights.path}: cannot be cleared: {_reason(error)}") from error
    kernels = _kernels()
    try:
        for path in kernels:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise LlamaclustError(f"compiled kernels cannot be deleted: {_reason(error)}") from error
    if as_json:
        deleted = {"files": cleared.files, "size_bytes": cleared.size_bytes}
        deleted |= {"kernel_files": len(kernels), "kernel_bytes": sum(kernels.values())}
        deleted |= {"fetched_files": brought.files, "fetched_bytes": brought.size_bytes}
        print(json.dumps({"folder": str(folder.path), **deleted, "left": [error.filename for error in cleared.left]}))
    else:
        print(f"{cleared.files} files, {cleared.size_bytes / MIB:,.2f} MiB deleted in {folder.path}")
        if brought.files:
            print(f"{brought.files} files, {brought.size_bytes / MIB:,.2f} MiB deleted in {weights.path}")
        if kernels:
            print(f"{len(kernels)} files, {sum(kernels.values()) / MIB:,.2f} MiB of compiled kernels deleted")
    if cleared.left:
        raise LlamaclustError(f"{folder.path}: cannot be deleted: {'; '.join(map(_reason, cleared.left))}")


def _reason(error: OSError) -> str:
    what = (error.strerror or str(error)).lower()
    return what if error.filename is None else f"{printable(str(error.filename))}: {what}"


def _folder() -> PackedCacheFolder:
    from llamaclust.cluster.config.environment import environment
    from llamaclust.kernels.packed.cache_folder import PackedCacheFolder

    variables = environment()
    return PackedCacheFolder(variables.packed_cache_dir, variables.packed_cache_bytes)


def _weights() -> WeightCache:
    from llamaclust.cluster.config.environment import environment
    from llamaclust.model.weights.cache import WeightCache

    variables = environment()
    return WeightCache(variables.weights_dir, variables.weights_bytes)


def _kernels() -> dict[Path, int]:
    """Files of kernels compiled for GPUs, and their bytes. LlamaclustError where they cannot be listed."""
    from llamaclust.cluster.config.environment import environment
    from llamaclust.kernels.cuda.runtime.cubin_cache import kernel_files

    folder = environment().kernels_dir
    try:
        return {path: found.st_size for path, found in kernel_files(folder)}
    except OSError as error:
        raise LlamaclustError(f"{folder}: cannot be listed: {_reason(error)}") from error
