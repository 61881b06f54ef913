"""A model with a projector, tiles for its encoder, and a check of the encoded rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.engine.encoder import Encoder
from llamaclust.kernels.cpu.backend import CpuBackend
from support.clusters.recovering import CONTEXT
from support.models.tiny_model import build_tiny_model
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector
from support.seed import SEED


def seeing_model(tmp_path: Path, layers: int = 4) -> tuple[Path, Path]:
    """Writes a model and its projector."""
    folder = tmp_path / "seeing"
    folder.mkdir()
    model = build_tiny_model(folder / "a.gguf", hidden=TEXT_WIDTH, heads=4, layers=layers, context=CONTEXT)
    return model, build_projector(folder / "mmproj-a.gguf", "pixtral")


def random_tiles() -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(SEED)
    return [random.integers(0, 256, (160, 160, 3), np.uint8) for _ in range(2)]


async def encode(encoder: Encoder, tiles: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    async with encoder.turn(""):
        return await encoder.encode(tiles, [""])


def check_rows(path: Path, tiles: list[NDArray[np.uint8]], found: list[NDArray[np.float32]]) -> None:
    for rows, tile in zip(found, tiles, strict=True):
        np.testing.assert_array_equal(rows.view("u4"), encoded(CpuBackend(1), path, tile).view("u4"))
