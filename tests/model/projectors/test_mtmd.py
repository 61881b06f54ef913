"""Compares rows of image encoders with those recorded from llama.cpp's library mtmd."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.model.quant_types import QuantType
from support.arithmetic.backends import all_threads
from support.models.vision.encoded_tiles import encoded
from support.models.vision.record_mtmd import mtmd_rows, projector_for_mtmd, tile_for_mtmd
from support.models.vision.tiny_projectors import PROJECTORS

BOUNDS = {QuantType.F32: 1e-6, QuantType.F16: 1e-4}


def error(name: str, kind: QuantType, folder: Path) -> float:
    path = projector_for_mtmd(folder / "p.gguf", name, kind)
    found, wanted = encoded(all_threads(2), path, tile_for_mtmd(name)).reshape(-1), mtmd_rows(name)[kind]
    assert found.shape == wanted.shape
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("name", PROJECTORS)
def test_rows_are_those_of_llama_cpp(name: str, kind: QuantType, tmp_path: Path) -> None:
    assert error(name, kind, tmp_path) < BOUNDS[kind]
