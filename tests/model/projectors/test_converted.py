"""Compares rows of projector files that llama.cpp's converter wrote with the rows of transformers' models."""

from __future__ import annotations

import numpy as np
import pytest

from llamaclust.model.architectures.vision import FAMILIES
from llamaclust.model.projectors.projector import open_projector
from support.arithmetic.backends import BACKENDS
from support.models.vision.converted.cases import CASES, FOLDER
from support.models.vision.encoded_tiles import encoded


def test_each_supported_projector_is_recorded() -> None:
    assert {open_projector(FOLDER / f"{name}.gguf").name for name in CASES} == FAMILIES.keys()


@pytest.mark.parametrize("backend", ["reference", "cpu-1-thread"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_transformers(name: str, backend: str) -> None:
    found = encoded(BACKENDS[backend](), FOLDER / f"{name}.gguf", CASES[name].random_tile())
    wanted = np.frombuffer((FOLDER / f"{name}.f32").read_bytes(), "<f4").reshape(found.shape)
    assert ((found - wanted) ** 2).sum() <= 1e-6 * (wanted**2).sum()


def test_rows_of_gemma_attend_to_each_other_unless_its_encoder_has_clamps() -> None:
    found = {name for name in CASES if open_projector(FOLDER / f"{name}.gguf").is_bidirectional}
    assert found == {"gemma3", "gemma4v"} and "gemma4v-clamped" in CASES
