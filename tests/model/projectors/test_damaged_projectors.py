"""Checks that damaged projector files are refused in one line or compute rows, with bounded memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError, RequestError
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import WritableValue
from llamaclust.model.images.projector_settings import low_detail, settings_of
from llamaclust.model.projectors.projector import open_projector
from llamaclust.model.projectors.tiles import TileReader
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import PROJECTORS, build_projector, tile_of
from support.seed import SEED

COUNT = 200
MEMORY_LIMIT_BYTES = 1 << 24
VALUES: tuple[WritableValue, ...] = (
    *(0, 1, 3, 7, (1 << 16) - 1, 1 << 31, (1 << 32) - 1, -1, -(1 << 31), 1 << 62),
    *(float("nan"), float("inf"), -1.0, 0.0, 1e38, True, False, "", "idefics3"),
    *(np.zeros(0, np.float32), np.zeros(3, np.float32), np.full(3, np.nan, np.float32), np.ones(99, np.int32)),
)


def outcome(path: Path, family: str) -> str:
    """Opens a projector, computes a tile's rows, and returns the outcome."""
    tracemalloc.start()
    try:
        projector = open_projector(path)
        low_detail(settings_of(projector))
        TileReader(projector)
    except ModelFileError as error:
        line = str(error)
        assert line.isprintable() and str(path) in line and len(line) < 500 and error.exit_code == 2, line
        return "refused"
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < MEMORY_LIMIT_BYTES, peak_bytes
    try:
        encoded(CpuBackend(1), path, tile_of(family))
    except RequestError as error:
        assert str(error).isprintable(), error
        return "other tiles"
    return "rows"


@pytest.mark.parametrize("family", PROJECTORS)
def test_damaged_bytes(family: str, tmp_path: Path) -> None:
    print(f"LLAMACLUST_TEST_SEED={SEED}")
    random, outcomes, path = Random(SEED), Counter[str](), tmp_path / "damaged.gguf"
    good = build_projector(tmp_path / "good.gguf", family)
    content, header = good.read_bytes(), min(each.offset for each in open_model(good).tensors.values())
    for _ in range(COUNT // len(PROJECTORS) + 1):
        path.write_bytes(_damaged(content, header, random))
        outcomes[outcome(path, family)] += 1
    assert outcomes["refused"] > 0, outcomes


def _damaged(good: bytes, header: int, random: Random) -> bytes:
    if random.random() < 0.2:
        return good[: random.randrange(len(good))]
    data = bytearray(good)
    for _ in range(random.choice((1, 2, 8))):
        data[random.randrange(header)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    return bytes(data)


@pytest.mark.parametrize("family", PROJECTORS)
def test_numbers_that_lie(family: str, tmp_path: Path) -> None:
    """Checks other values of each key."""
    print(f"LLAMACLUST_TEST_SEED={SEED}")
    random, path = Random(SEED), tmp_path / "lying.gguf"
    metadata = open_model(build_projector(path, family)).metadata
    names = [name.removeprefix("clip.") for name in metadata if name.startswith("clip.")]
    outcomes = Counter[str]()
    for name in names:
        for value in random.sample(VALUES, 5):
            print(name, value)
            outcomes[outcome(build_projector(path, family, keys={name: value}), family)] += 1
    assert outcomes["refused"] > len(names), outcomes


@pytest.mark.parametrize("family", PROJECTORS)
def test_weights_that_are_no_numbers(family: str, tmp_path: Path) -> None:
    """Checks that weights of NaN do not crash the computation."""
    path = build_projector(tmp_path / "p.gguf", family)
    data = bytearray(path.read_bytes())
    for tensor in open_model(path).tensors.values():
        data[tensor.offset : tensor.offset + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    assert outcome(path, family) == "rows"
