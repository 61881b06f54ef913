"""Fixtures for tests of packed layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.model.quant_types import QuantType
from support.arithmetic.packed_layers import LAYERS, settled
from support.models.tiny_model import build_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return settled(build_tiny_model(tmp_path / "m.gguf", layers=LAYERS, quant_type=QuantType.Q4_0))


@pytest.fixture
def folder(tmp_path: Path) -> PackedCacheFolder:
    return PackedCacheFolder(tmp_path / "home" / "packed", 1 << 30)
