"""Checks that image encoders give the CPU backend's bits on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from support.cuda.stages import same
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import PROJECTORS, build_projector, tile_of


@pytest.mark.parametrize("name", PROJECTORS)
def test_rows(name: str, cuda: CudaBackend, cpu: CpuBackend, tmp_path: Path) -> None:
    path = build_projector(tmp_path / "p.gguf", name)
    same(encoded(cuda, path, tile_of(name)), encoded(cpu, path, tile_of(name)))
