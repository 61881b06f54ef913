"""Tests of image settings of published projectors and of low detail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.model.images.projector_settings import low_detail, settings_of
from llamaclust.model.images.settings import ImageSettings
from llamaclust.model.projectors.projector import Projector, open_projector
from support.models.vision.tiny_projectors import PROJECTORS, build_projector
from support.pictures import SETTINGS

UNKNOWN: dict[str, Any] = dict.fromkeys(("longest_edge", "min_pixels", "max_pixels", "min_tiles", "max_tiles"), 0)


def projector_with(path: Path, name: str, patch_size: int, merge: int, **numbers: int) -> Projector:
    tiny = open_projector(build_projector(path / "p.gguf", name))
    return replace(
        tiny,
        hyperparameters=replace(tiny.hyperparameters, patch_size=patch_size, merge=merge),
        images=replace(tiny.images, **(UNKNOWN | numbers)),
    )


@pytest.mark.parametrize(
    ("name", "patch_size", "merge", "numbers", "wanted"),
    [
        ("gemma3", 14, 4, {"image_size": 896}, SETTINGS["gemma3"]),  # Gemma 3 4B
        ("idefics3", 16, 4, {"image_size": 512}, SETTINGS["idefics3"]),  # SmolVLM 500M
        ("idefics3", 14, 3, {"image_size": 378, "longest_edge": 1512}, None),  # SmolVLM2 2.2B
        ("internvl", 14, 2, {"image_size": 448}, SETTINGS["internvl"]),  # InternVL 3
        ("internvl", 14, 2, {"image_size": 448, "min_tiles": 2, "max_tiles": 6}, None),
        ("kimivl", 14, 2, {"image_size": 896, "max_pixels": 1024 * 28**2}, SETTINGS["kimivl"]),  # Kimi VL A3B
        ("lfm2", 16, 2, {"image_size": 256, "min_pixels": 64 * 32**2, "max_pixels": 256 * 32**2}, SETTINGS["lfm2"]),
        ("llama4", 14, 2, {"image_size": 336}, SETTINGS["llama4"]),  # Scout
        ("pixtral", 14, 2, {"image_size": 1540, "max_pixels": 1024 * 28**2}, SETTINGS["pixtral"]),  # Mistral Small 3.1
        ("pixtral", 16, 1, {"image_size": 1024}, ImageSettings("pixtral", 16, 1, longest_edge=1024)),  # Pixtral 12B
    ],
)
def test_settings_of_published_models(
    name: str, patch_size: int, merge: int, numbers: dict[str, int], wanted: ImageSettings | None, tmp_path: Path
) -> None:
    found = settings_of(projector_with(tmp_path, name, patch_size, merge, **numbers))
    if wanted is None:
        wanted = ImageSettings(name, patch_size, merge, **numbers)
    assert found == wanted


@pytest.mark.parametrize("name", PROJECTORS)
def test_free_sizes_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    projector = open_projector(build_projector(tmp_path / "p.gguf", name))
    found, numbers = settings_of(projector), projector.images
    assert (found.projector, found.patch_size, found.merge) == (name, projector.patch_size, projector.merge)
    if projector.family.tokens is not None and name != "pixtral":
        assert (found.min_pixels, found.max_pixels) == (numbers.min_pixels, numbers.max_pixels)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gemma3", {}),
        ("gemma4v", {"max_pixels": 10**2 * 48**2}),
        ("glm4v", {"max_pixels": 18**2 * 28**2}),
        ("idefics3", {"longest_edge": 512}),
        ("internvl", {"max_tiles": 1}),
        ("kimivl", {"max_pixels": 18**2 * 28**2}),
        ("lfm2", {"min_tiles": 1, "max_tiles": 1}),
        ("llama4", {"max_tiles": 1}),
        ("pixtral", {"longest_edge": 512}),
        ("qwen2.5vl_merger", {"max_pixels": 18**2 * 28**2}),
        ("qwen3vl_merger", {"max_pixels": 16**2 * 32**2}),
    ],
)
def test_low_detail(name: str, wanted: dict[str, Any]) -> None:
    assert low_detail(SETTINGS[name]) == replace(SETTINGS[name], **wanted)
