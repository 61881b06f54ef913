"""Encoders of images: rows by an independent computation in float64, and by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Backend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.projectors.positions import read_floats
from support.arithmetic.backends import all_threads
from support.arithmetic.encoded_tiles import encoded
from support.arithmetic.vision import Weights, encoder_rows
from support.models.record_projectors import recorded_at
from support.models.tiny_projectors import PROJECTORS, build_projector, tile_of

BACKENDS: dict[str, Callable[[], Backend]] = {"reference": ReferenceBackend, "cpu": lambda: all_threads(2)}


@pytest.fixture(scope="module", params=PROJECTORS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_projector(tmp_path_factory.mktemp("projector") / f"{name}.gguf", name)


def nmse(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def weights_of(path: Path) -> Weights:
    return {name: read_floats(tensor).astype(np.float64) for name, tensor in open_model(path).tensors.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows(backend: str, name: str, path: Path) -> None:
    wanted = encoder_rows(name, weights_of(path), tile_of(name))
    assert nmse(encoded(BACKENDS[backend](), path, tile_of(name)), wanted) < 1e-6


def test_rows_are_those_of_transformers(name: str, path: Path) -> None:
    found = encoded(ReferenceBackend(), path, tile_of(name))
    wanted = np.frombuffer(recorded_at(name).read_bytes(), "<f4").reshape(found.shape)
    assert nmse(found, wanted) < 1e-6
