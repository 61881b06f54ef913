"""Tests of a loaded image encoder: the reference's rows, its limits and its memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import RequestError
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.projectors.projector import Projector, open_projector
from llamaclust.model.quant_types import QuantType
from llamaclust.worker.devices.encoder_limits import encoder_limits
from llamaclust.worker.devices.encoder_memory import encoder_bytes
from llamaclust.worker.encoder.tile_encoder import TileEncoder
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import PATCH, PROJECTORS, build_projector, tile_of


def loaded(projector: Projector) -> TileEncoder:
    return TileEncoder(CpuBackend(1), projector, encoder_bytes(projector, 1), None, lambda done_bytes: None)


@pytest.mark.parametrize("name", PROJECTORS)
def test_rows_have_the_bits_of_a_stage_for_one_tile(name: str, tmp_path: Path) -> None:
    path = build_projector(tmp_path / "p.gguf", name)
    encoder, wanted = loaded(open_projector(path)), encoded(CpuBackend(2), path, tile_of(name))
    for _ in range(2):
        np.testing.assert_array_equal(encoder.rows(tile_of(name)).view("u4"), wanted.view("u4"))


@pytest.mark.parametrize("name", PROJECTORS)
def test_memory_is_what_was_planned(name: str, tmp_path: Path) -> None:
    projector = open_projector(build_projector(tmp_path / "p.gguf", name, QuantType.F16))
    encoder = loaded(projector)
    stage = encoder._stage
    planned = encoder_bytes(projector, 1)
    assert encoder.memory == planned
    limits = encoder_limits(projector)
    side = projector.merge * PATCH
    table = encoder._reader._table
    added_bytes = 0 if table is None else table.nbytes
    assert stage.weight_bytes + added_bytes <= planned.weight_bytes < stage.weight_bytes + added_bytes + 4096
    patch_bytes = 4 * limits.max_batch_tokens * projector.program.hidden.width
    assert stage.workspace_bytes + stage.kv_bytes + patch_bytes < planned.workspace_bytes
    assert encoder.reserved_bytes == planned.workspace_bytes - stage.workspace_bytes > 0
    lines = projector.max_tile_pixels // (side * side)
    size = projector.images.image_size
    largest = (size, size) if projector.family.tokens is None else (side, lines * side)
    assert projector.rows_of(*largest) * projector.hyperparameters.merged <= limits.max_batch_tokens


def test_layers_share_kv_memory(tmp_path: Path) -> None:
    projector = open_projector(build_projector(tmp_path / "p.gguf", "gemma3"))
    (layer,) = projector.program.kv_layers
    assert loaded(projector)._stage.kv_bytes == 64 * layer.kv_token_bytes


def test_the_largest_tile_is_encoded(tmp_path: Path) -> None:
    """The model family allows tiles of any shape, from one row of patches to a square."""
    path = build_projector(tmp_path / "p.gguf", "qwen3vl_merger", keys={"vision.image_max_pixels": 256 * 64})
    encoder = loaded(open_projector(path))
    for size in ((8, 2048), (128, 128), (2048, 8)):
        tile = np.random.default_rng(7).integers(0, 256, (*size, 3), np.uint8)
        wanted = encoded(CpuBackend(1), path, tile)
        np.testing.assert_array_equal(encoder.rows(tile).view("u4"), wanted.view("u4"))
    with pytest.raises(RequestError, match="sides in multiples of 8 and at most 16384 pixels, but has 2056 x 8"):
        encoder.rows(np.zeros((8, 2056, 3), np.uint8))


@pytest.mark.parametrize("name", ["qwen3vl_merger", "qwen2.5vl_merger", "kimivl", "pixtral"])
@pytest.mark.parametrize("size", [(256, 256), (4096, 16), (16, 4096)])
def test_a_tile_takes_no_more_memory_than_planned(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = build_projector(tmp_path / "p.gguf", name, keys={"vision.image_max_pixels": 1 << 16})
    encoder = loaded(open_projector(path))
    planned = encoder.memory.workspace_bytes - encoder._stage.workspace_bytes - encoder._stage.kv_bytes
    tile = np.random.default_rng(8).integers(0, 256, (*size, 3), np.uint8)
    tracemalloc.start()
    encoder.rows(tile)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert planned / 3 < most_bytes < planned


def test_rows_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = build_projector(tmp_path / "p.gguf", "idefics3")
    encoder = loaded(open_projector(path))
    encoder._reader._normalized[:] = np.inf
    with pytest.raises(RequestError, match="for a tile of 32 x 32 pixels are not finite; the projector p"):
        encoder.rows(tile_of("idefics3"))
