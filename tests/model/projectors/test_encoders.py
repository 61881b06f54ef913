"""Compares rows of image encoders with an independent computation in float64 and with transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Float32
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.projectors.positions import read_floats
from llamaclust.model.quant_types import QuantType
from support.arithmetic.backends import BACKENDS, all_threads
from support.models.vision.encoded_tiles import encoded
from support.models.vision.float_encoders import Float64, Weights, encoder_rows
from support.models.vision.record_projectors import REFERENCES
from support.models.vision.recording import recorded_at
from support.models.vision.tiny_projectors import PROJECTORS, build_projector, tile_of


@pytest.fixture(scope="module", params=PROJECTORS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_projector(tmp_path_factory.mktemp("projector") / f"{name}.gguf", name)


def nmse(found: Float32, wanted: Float32 | Float64) -> float:
    assert found.shape == wanted.shape
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def weights_of(path: Path) -> Weights:
    return {name: read_floats(tensor).astype(np.float64) for name, tensor in open_model(path).tensors.items()}


@pytest.mark.parametrize("backend", ["reference", "cpu-1-thread"])
def test_rows(backend: str, name: str, path: Path) -> None:
    wanted = encoder_rows(name, weights_of(path), tile_of(name))
    assert nmse(encoded(BACKENDS[backend](), path, tile_of(name)), wanted) < 1e-6


@pytest.mark.parametrize("recorded", REFERENCES)
def test_rows_are_those_of_transformers(recorded: str, tmp_path: Path) -> None:
    path = build_projector(tmp_path / "p.gguf", recorded)
    found = encoded(ReferenceBackend(), path, tile_of(recorded))
    wanted = np.frombuffer(recorded_at(recorded).read_bytes(), "<f4").reshape(found.shape)
    assert nmse(found, wanted) < 1e-6


@pytest.mark.parametrize("kind", [QuantType.F16, QuantType.BF16, QuantType.Q8_0])
def test_weights_of_other_types(kind: QuantType, name: str, tmp_path: Path) -> None:
    path = build_projector(tmp_path / "p.gguf", name, kind)
    wanted = encoder_rows(name, weights_of(path), tile_of(name))
    bound = 2e-3 if kind is QuantType.Q8_0 else 1e-6  # products with 8-bit activations have larger errors
    assert nmse(encoded(all_threads(2), path, tile_of(name)), wanted) < bound


def test_levels_and_threads_have_the_same_bits(name: str, path: Path) -> None:
    first, *others = (make for label, make in BACKENDS.items() if label.startswith("cpu"))
    rows = encoded(first(), path, tile_of(name))
    for make in others:
        np.testing.assert_array_equal(encoded(make(), path, tile_of(name)).view("u4"), rows.view("u4"))
