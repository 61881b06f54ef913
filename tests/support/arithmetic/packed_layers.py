"""Loads of a tiny model with a packed-weight cache."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.model.loader import Model
from support.arithmetic.batches import batch_of

LIMITS = StageLimits(max_batch_tokens=32, max_outputs=32, max_sequences=1, max_context_tokens=64, kv_blocks=4)
TOKENS = list(range(3, 23))
LAYERS = 3
IMAGES = LAYERS + 2  # plus token embedding and output


def use_any_disk() -> None:
    """Makes this process cache packed layers even on a full disk."""
    PackedCacheFolder.free_bytes = 0


def settled(path: Path) -> Path:
    """Waits until the file is old enough for its layers to be cached."""
    time.sleep(0.15)
    return path


def run(path: Path, folder: PackedCacheFolder | None, level: str | None = None) -> bytes:
    """Returns the bits of the logits after all packed layers have been written."""
    model, backend = Model.open(path), CpuBackend(2, level, packed_cache=folder)
    program = model.program(0, model.layer_count)
    with closing(backend.load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)) as stage:
        if backend.packed_cache is not None:
            backend.packed_cache.wait()
        rows = range(len(TOKENS))
        return stage.run(batch_of([(TOKENS, list(rows), range(2))]), None).tobytes()


def images(folder: PackedCacheFolder) -> list[Path]:
    return sorted(folder.path.glob("*.tiles"))
