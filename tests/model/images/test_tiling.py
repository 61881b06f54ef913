"""Checks that images of any shape become tiles whose rows are all in the prompt, once and in order."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import numpy as np
import pytest
from PIL import Image

from llamaclust.model.images.families.family import TileRows
from llamaclust.model.images.prompt import prompt_of
from llamaclust.model.images.settings import ImageError, ImageSettings
from llamaclust.model.images.tiling import tiling_of
from support.pictures import SETTINGS, SIZES, Pixels, picture, shown, sizes_of


def tiles_and_prompt(pixels: Pixels, settings: ImageSettings) -> tuple[list[Pixels], str]:
    tiling = tiling_of(Image.fromarray(pixels), settings)
    tiles = [np.asarray(tile) for tile in tiling.tiles]
    prompt = prompt_of(settings, sizes_of(tiles), tiling.columns, tiling.rows)
    assert all(not isinstance(a, str) or not isinstance(b, str) for a, b in pairwise(prompt))
    rows = [
        (piece.tile, row) for piece in prompt if isinstance(piece, TileRows) for row in range(piece.start, piece.end)
    ]
    side = settings.side
    assert rows == [
        (number, row) for number, t in enumerate(tiles) for row in range(t.shape[0] // side * (t.shape[1] // side))
    ]
    return tiles, shown(prompt)


def kimi_expected(pixels: Pixels) -> Pixels:
    """Returns the image as Kimi-VL's own code prepares it: at most 4,096 patches of 14 pixels, padded with black."""
    image = Image.fromarray(pixels)
    width, height = image.size
    count = (width // 14) * (height // 14)
    if count > 4096:
        scale = sqrt(4096 / count)
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    tall, wide = array.shape[:2]
    return np.pad(array, ((0, -tall % 28), (0, -wide % 28), (0, 0)))


def test_kimi_is_reduced_and_padded() -> None:
    for number in range(len(SIZES)):
        expected = kimi_expected(picture(number))
        tiles, prompt = tiles_and_prompt(picture(number), SETTINGS["kimivl"])
        assert len(tiles) == 1 and np.array_equal(tiles[0], expected), SIZES[number]
        rows = expected.shape[0] * expected.shape[1] // 28**2
        assert prompt == f"<|media_start|>[{rows}]<|media_end|>"


@pytest.mark.parametrize(
    ("family", "size"), [("qwen2vl_merger", (2010, 10)), ("glm4v", (5, 6000)), ("kimivl", (7200, 20))]
)
def test_shapes_that_a_family_does_not_take_are_refused(family: str, size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"\d+ x \d+ pixels: .*; send a"):
        tiling_of(Image.new("RGB", size), SETTINGS[family])


@pytest.mark.parametrize("family", sorted(SETTINGS))
@pytest.mark.parametrize("size", [(1, 1), (6000, 40), (1, 150), (4000, 4000)])
def test_extreme_shapes_have_bounded_tiles(family: str, size: tuple[int, int]) -> None:
    settings = SETTINGS[family]
    tiles = tiling_of(Image.new("RGB", size), settings).tiles
    assert all(min(tile.size) >= settings.side for tile in tiles) and len(tiles) <= 17
    assert all(tile.width % settings.side == tile.height % settings.side == 0 for tile in tiles)


def test_a_digest_covers_the_picture_the_projector_and_every_setting() -> None:
    settings = SETTINGS["lfm2"]
    digests = {settings.digest(b"a", "p"), settings.digest(b"b", "p"), settings.digest(b"a", "q")}
    digests |= {each.digest(b"a", "p") for each in SETTINGS.values()}
    assert len(digests) == 2 + len(SETTINGS)
