"""Checks that tiles and the text around them equal those of transformers' image processors (see record_tiles.py)."""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llamaclust.model.images.prompt import prompt_of
from llamaclust.model.images.tiling import tiling_of
from support.pictures import REFERENCES, SAMPLES, SETTINGS, SIZES, picture, runs, samples_of, shown, sizes_of

RECORDED: dict[str, list[dict[str, Any]]] = json.loads(REFERENCES.read_text())


@pytest.mark.parametrize("family", sorted(RECORDED))
def test_tiles_and_prompts_are_those_of_the_reference(family: str) -> None:
    assert len(RECORDED[family]) == len(SIZES) == 40
    differing = 0
    for number, expected in enumerate(RECORDED[family]):
        tiling = tiling_of(Image.fromarray(picture(number)), SETTINGS[family])
        tiles = [np.asarray(tile) for tile in tiling.tiles]
        prompt = shown(prompt_of(SETTINGS[family], sizes_of(tiles), tiling.columns, tiling.rows))
        assert (runs(sizes_of(tiles)), prompt) == (expected["tiles"], expected["prompt"]), SIZES[number]
        samples = np.frombuffer(b64decode(expected["samples"]), np.uint8).reshape(SAMPLES, 3)
        difference = np.abs(samples_of(tiles, number).astype(int) - samples.astype(int))
        assert difference.max() <= 1, (SIZES[number], difference.max(axis=1))
        differing += int((difference > 0).sum())
    assert differing < 0.1 * 40 * SAMPLES * 3
