"""Tests of a packed-weight cache that cannot be mapped, read, written or found: loading continues and logs the reason
once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest

from llamaclust.core.disk_cache import files
from llamaclust.core.disk_cache.cache import NoRoomError
from llamaclust.core.errors import ModelFileError
from llamaclust.kernels._native import Memory
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.packed import cache, cache_writer
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.kernels.packed.cache_writer import BackgroundWriter, Made
from llamaclust.model.loader import Model
from support.arithmetic.packed_layers import IMAGES, LIMITS, images, run


def test_a_model_file_that_is_gone_is_reported(model: Path, folder: PackedCacheFolder) -> None:
    opened, backend = Model.open(model), CpuBackend(2, packed_cache=folder)
    program = opened.program(0, 1)
    tensors = opened.tensors_for(program)
    model.unlink()
    with pytest.raises(ModelFileError, match="no such file"):
        backend.load(program, tensors, LIMITS, lambda done_bytes: None)


def test_a_file_that_cannot_be_mapped_is_an_error_with_its_number() -> None:
    reading, writing = os.pipe()
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    for size in (100, 5 << 20):
        with pytest.raises(OSError, match="No such device") as caught:
            Memory.mapped(reading, size)
        assert caught.value.errno == errno.ENODEV
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= maps + 1
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("remote", [True, False])
def test_what_cannot_or_may_not_be_mapped_is_read(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    maps: list[int] = []

    def refuse(descriptor: int, n_bytes: int) -> Memory:
        maps.append(n_bytes)
        raise OSError(errno.ENODEV, "No such device")

    wanted = run(model, folder)
    monkeypatch.setattr("llamaclust.kernels._native.Memory.mapped", refuse)
    monkeypatch.setattr("llamaclust.kernels._native.PackedMatrix.pack_rows", None)
    monkeypatch.setattr(cache, "is_remote", lambda path: remote)
    assert run(model, folder) == wanted
    assert len(maps) == (0 if remote else IMAGES)


def test_an_image_deleted_before_it_is_read_is_no_damage(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def delete(path: Path) -> bool:
        images(folder)[1].unlink()
        return True

    wanted = run(model, folder)
    monkeypatch.setattr(cache, "is_remote", delete)
    assert run(model, folder) == wanted
    assert caplog.text == "" and len(images(folder)) == IMAGES


def test_a_writer_that_fails_says_so_and_is_done(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_writer, "sha256", None)
    assert run(model, folder) == run(model, None)
    (record,) = caplog.records
    assert record.levelname == "ERROR" and record.exc_info is not None
    assert list(folder.path.glob("*.json")) == []


def test_a_writer_gives_up_on_a_lock_with_one_line(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_LOCK_WAIT_S", 0.05)
    folder.create()
    with folder.locked():
        run(model, folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "another process" in record.getMessage()
    run(model, folder)
    assert len(images(folder)) == IMAGES


def no_folder(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("a file")


def open_to_all(path: Path) -> None:
    path.mkdir(parents=True)
    path.chmod(0o777)


@pytest.mark.parametrize("spoil", [no_folder, open_to_all])
def test_a_folder_that_will_not_do_is_one_warning(
    model: Path, folder: PackedCacheFolder, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    spoil(folder.path)
    assert run(model, folder) == run(model, None)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(folder.path) in record.getMessage()
    assert not folder.path.is_dir() or list(folder.path.iterdir()) == []


def test_a_write_that_fails_is_one_warning(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_all", full)
    assert run(model, folder) == run(model, None)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "No space left on device" in record.getMessage()
    assert [path.name for path in folder.path.iterdir()] == ["lock"]


def test_a_load_whose_layers_have_no_room_tries_once(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU loads add one layer at a time, and each try would read the whole layer."""
    tried: list[int] = []

    def store(_: object, made: Made, memory: Memory) -> None:
        tried.append(made.since_ns)
        raise NoRoomError("no room")

    monkeypatch.setattr(BackgroundWriter, "_store", store)
    writer, memory = BackgroundWriter(folder), Memory(64)
    layer: Any = SimpleNamespace(name="blk.0")
    for since_ns in (1, 1, 1, 2):
        writer.add([Made(layer, "key", ref(memory), since_ns)])
        writer.wait()
    assert tried == [1, 2]
