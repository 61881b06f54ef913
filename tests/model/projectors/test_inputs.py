"""Tests of the order and places of patches, and of interpolated positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamaclust.model.architectures.vision.family import Positions
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.projectors.order import in_groups, in_windows
from llamaclust.model.projectors.positions import interpolated, read_floats
from llamaclust.model.projectors.projector import open_projector
from llamaclust.model.projectors.tiles import TileReader
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import RandomTensor
from support.models.vision.tiny_projectors import MEAN, PATCH, WIDTH, build_projector, tile_of


def test_groups_are_contiguous() -> None:
    numbers = np.arange(24).reshape(4, 6)
    wanted = [numbers[y : y + 2, x : x + 2].reshape(-1) for y in (0, 2) for x in (0, 2, 4)]
    np.testing.assert_array_equal(in_groups(4, 6, 2).patches, np.concatenate(wanted))
    np.testing.assert_array_equal(in_groups(3, 5, 1).patches, np.arange(15))


def test_windows_are_contiguous() -> None:
    """Checks windows of 2 x 2 groups of 2 x 2 patches; the last ones of a line and a column are smaller."""
    order = in_windows(6, 10, 2, 2)
    numbers = np.arange(60).reshape(6, 10)
    windows = [numbers[y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4, 8)]
    assert order.windows is not None and order.places is not None
    ends = np.cumsum([window.size for window in windows])
    for window, end in zip(windows, ends, strict=True):
        rows = slice(end - window.size, end)
        assert sorted(order.patches[rows]) == sorted(window.reshape(-1))
        assert (order.windows[rows] == (rows.start, rows.stop)).all()
    groups = order.patches.reshape(-1, 4)
    places = groups[:, 0] // 20 * 5 + groups[:, 0] % 10 // 2
    np.testing.assert_array_equal(order.places, places)
    np.testing.assert_array_equal(groups - groups[:, :1], [[0, 1, 10, 11]] * 15)


@pytest.mark.parametrize("rule", [Positions.BILINEAR_CORNERS, Positions.ANTIALIASED, Positions.BICUBIC])
def test_interpolation(rule: Positions) -> None:
    table = np.random.default_rng(7).standard_normal((25, 3)).astype(np.float32)
    np.testing.assert_array_equal(interpolated(table, 5, 5, rule), table)
    ones = interpolated(np.ones((25, 3), np.float32), 3, 8, rule)
    np.testing.assert_allclose(ones, 1, rtol=1e-6)
    wide = interpolated(table, 3, 8, rule).reshape(3, 8, 3)
    turned = interpolated(table.reshape(5, 5, 3).swapaxes(0, 1).reshape(25, 3), 8, 3, rule).reshape(8, 3, 3)
    np.testing.assert_allclose(wide, turned.swapaxes(0, 1), atol=1e-6)
    if rule is Positions.BILINEAR_CORNERS:
        np.testing.assert_array_equal(wide[::2, ::7], table.reshape(5, 5, 3)[::4, ::4])


def test_a_patch_is_normalized_channel_by_channel(tmp_path: Path) -> None:
    reader = TileReader(open_projector(build_projector(tmp_path / "p.gguf", "pixtral")))
    tile = tile_of("pixtral")
    inputs = reader.inputs(tile)
    assert inputs.rope_positions is not None and inputs.groups is None
    for row in (0, 1, 7, 59):
        y, x = inputs.rope_positions[:, row] * PATCH
        part = tile[y : y + PATCH, x : x + PATCH].astype(np.float64) / 255
        wanted = ((part - MEAN) / (0.25, 0.3, 0.35)).transpose(2, 0, 1).reshape(-1)
        np.testing.assert_allclose(inputs.patches[row], wanted, atol=1e-6)


def test_the_class_row_is_behind_the_patches(tmp_path: Path) -> None:
    path = build_projector(tmp_path / "p.gguf", "llama4")
    inputs = TileReader(open_projector(path)).inputs(tile_of("llama4"))
    assert inputs.rope_positions is not None and inputs.groups is not None
    assert len(inputs.patches) == 68 and inputs.merged_rows == 16
    assert (inputs.rope_positions[:, 64:] == 0).all() and (inputs.rope_positions[:, 0] == 1).all()
    assert (inputs.groups[:65] == (0, 65)).all() and inputs.groups[65:].tolist() == [[65, 66], [66, 67], [67, 68]]
    tensors = open_model(path).tensors
    row = read_floats(tensors["v.class_embd"]) + read_floats(tensors["v.position_embd.weight"])[64]
    np.testing.assert_array_equal(inputs.patches[64], np.concatenate((np.zeros(48), row)).astype(np.float32))


@pytest.mark.parametrize("kind", [QuantType.F16, QuantType.BF16, QuantType.Q8_0])
def test_positions_of_other_types(kind: QuantType, tmp_path: Path) -> None:
    name = "v.position_embd.weight"
    exact = read_floats(open_model(build_projector(tmp_path / "exact.gguf", "idefics3")).tensor(name))
    table = RandomTensor(name, (64, WIDTH), 0.5)
    path = build_projector(tmp_path / "p.gguf", "idefics3", kind, without=(name,), added=(table,))
    found = read_floats(open_model(path).tensor(name))
    assert open_model(path).tensor(name).quant_type is kind and 0 < np.abs(found - exact).max() < 0.02
