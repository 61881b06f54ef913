"""Tests of foreign and damaged files in the packed-weight cache: layers are packed again, nothing hangs, and each file
is logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.core.disk_cache import files
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.packed import cache_writer
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.model.loader import Model
from support.arithmetic.packed_layers import IMAGES, LIMITS, images, run, use_any_disk
from support.paths import TESTS

Change = Callable[[Path], object]

pytestmark = pytest.mark.timeout(60)


def entries(folder: PackedCacheFolder) -> list[Path]:
    return sorted(folder.path.glob("*.json"))


def loop(path: Path) -> None:
    path.symlink_to(path)


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("x")


def same_sizes(folder: PackedCacheFolder) -> tuple[Path, Path]:
    by_size: dict[int, Path] = {}
    for path in entries(folder):
        n_bytes = json.loads(path.read_bytes())["n_bytes"]
        if n_bytes in by_size:
            return by_size[n_bytes], path
        by_size[n_bytes] = path
    raise AssertionError("no two layers are of one size")


def test_entries_that_changed_places_are_none(model: Path, folder: PackedCacheFolder) -> None:
    wanted = run(model, folder)
    one, other = same_sizes(folder)
    was = one.read_bytes(), other.read_bytes()
    one.write_bytes(was[1]), other.write_bytes(was[0])
    assert run(model, folder) == wanted
    assert (one.read_bytes(), other.read_bytes()) == was


DAMAGES = [b"", b"\xff\xfe\x00", b"[" * 100_000, b"[[1]]", b'{"model":' + b"9" * 6000 + b"}", b" " * (1 << 19), b"null"]


@pytest.mark.parametrize("data", DAMAGES, ids=range(len(DAMAGES)))
def test_whatever_is_in_an_entry_costs_no_more_than_packing(
    model: Path, folder: PackedCacheFolder, data: bytes
) -> None:
    wanted = run(model, folder)
    for path in entries(folder):
        path.write_bytes(data)
    assert folder.list_models() == []
    assert run(model, folder) == wanted
    (listed,) = folder.list_models()
    assert listed.parts == IMAGES


THINGS: list[Change] = [
    os.mkfifo,
    loop,
    lambda path: path.symlink_to("nothing"),
    lambda path: path.symlink_to("/dev/zero"),
]


@pytest.mark.parametrize("pattern", ["*.json", "*.tiles"])
@pytest.mark.parametrize("thing", THINGS, ids=["pipe", "loop", "dangling", "zero"])
def test_what_is_no_file_is_replaced(
    model: Path, folder: PackedCacheFolder, caplog: pytest.LogCaptureFixture, thing: Change, pattern: str
) -> None:
    wanted = run(model, folder)
    paths = sorted(folder.path.glob(pattern))
    for path in paths:
        path.unlink()
        thing(path)
    assert folder.in_the_way() == paths
    assert folder.list_models() == []
    assert run(model, folder) == wanted
    assert all(str(path) in caplog.text for path in paths)
    assert all(path.is_file() and not path.is_symlink() for path in paths)


@pytest.mark.parametrize("pattern", ["*.json", "*.tiles"])
def test_folders_in_the_way_are_named_once(
    model: Path, folder: PackedCacheFolder, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    wanted = run(model, folder)
    paths = sorted(folder.path.glob(pattern))
    for path in paths:
        path.unlink()
        full_folder(path)
    assert run(model, folder) == wanted
    (record,) = caplog.records
    assert any(str(path) in record.getMessage() for path in paths) and f"{IMAGES - 1} more" in record.getMessage()


@pytest.mark.parametrize("thing", [os.mkfifo, Path.mkdir, loop, lambda path: path.symlink_to("/dev/zero")])
def test_a_lock_that_is_no_file_is_one_warning(
    model: Path, folder: PackedCacheFolder, caplog: pytest.LogCaptureFixture, thing: Change
) -> None:
    folder.create()
    thing(folder.path / "lock")
    assert run(model, folder) == run(model, None)
    (record,) = caplog.records
    assert str(folder.path / "lock") in record.getMessage() and "Errno" not in record.getMessage()


def test_a_file_that_may_not_be_read_is_left_alone(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The test simulates the error, since the superuser may read all files."""
    wanted, opens = run(model, folder), os.open
    refused = images(folder)[0]

    def open_(path: object, flags: int, mode: int = 0o777) -> int:
        if path == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, flags, mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_)
    assert run(model, folder) == wanted
    (record,) = caplog.records
    assert f"{refused}: Permission denied" in record.getMessage()
    assert refused.exists() and len(images(folder)) == IMAGES


def test_clear_deletes_what_it_can_and_names_the_rest(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACLUST_HOME", str(folder.path.parent))
    run(model, folder)
    (folder.path / "lock").unlink()
    (folder.path / "lock").mkdir()
    (folder.path / "a.tmp").mkdir()
    os.mkfifo(folder.path / "b.tiles")
    loop(folder.path / "c.json")
    full_folder(folder.path / "d.json")
    listed = CliRunner().invoke(app, ["model", "cache", "list"])
    assert listed.exit_code == 0
    for name in ("lock", "a.tmp", "b.tiles", "c.json", "d.json"):
        assert f"{folder.path / name}: not a regular file; remove it\n" in listed.output
    result = CliRunner().invoke(app, ["model", "cache", "clear"])
    assert str(result.exception) == f"{folder.path}: cannot be deleted: {folder.path / 'd.json'}: directory not empty"
    assert sorted(path.name for path in folder.path.iterdir()) == ["d.json", "lock"]


def test_unfinished_files_are_listed(folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMACLUST_HOME", str(folder.path.parent))
    folder.create()
    (folder.path / "a.tmp").write_bytes(bytes(3 << 20))
    assert "3.00 MiB     1 unfinished" in CliRunner().invoke(app, ["model", "cache", "list"]).output
    listed = json.loads(CliRunner().invoke(app, ["model", "cache", "list", "--json"]).output)
    assert listed["unfinished"] == {"files": 1, "size_bytes": 3 << 20}


def test_the_end_finishes_a_layer_and_no_more(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends right after the load, like a program that gives one answer."""
    code = "import sys, pathlib, test_cache_hostile as test; test.load(*map(pathlib.Path, sys.argv[1:]))"
    paths = [str(TESTS), str(Path(__file__).parent), *sys.path]
    before = 0
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", code, str(model), str(folder.path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            check=True,
            timeout=60,
        )
        assert before < len(entries(folder)) < IMAGES
        assert list(folder.path.glob("*.tmp")) == []
        before = len(entries(folder))


def load(model: Path, folder: Path) -> None:
    """Loads a model and returns while its first layer is being written slowly."""
    writes, begun = files._write_all, threading.Event()

    def slow(descriptor: int, data: memoryview) -> None:
        begun.set()
        time.sleep(0.1)
        writes(descriptor, data)

    use_any_disk()
    files._write_all = slow
    cache_writer._FINISH_S = 30.0  # the test machine's disk may be slow
    opened, backend = Model.open(model), CpuBackend(2, packed_cache=PackedCacheFolder(folder, 1 << 30))
    program = opened.program(0, opened.layer_count)
    kept = ExitStack()
    kept.callback(backend.load(program, opened.tensors_for(program), LIMITS, lambda done_bytes: None).close)
    begun.wait(30)
    globals()["kept"] = kept


def test_the_end_waits_no_longer_for_the_disk(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_writer, "_FINISH_S", 0.05)
    monkeypatch.setattr(cache_writer, "_STOP_S", 0.05)
    syncs, goes_on = threading.Event(), threading.Event()

    def stuck(descriptor: int) -> None:
        syncs.set()
        goes_on.wait(30)

    monkeypatch.setattr(os, "fsync", stuck)
    opened, backend = Model.open(model), CpuBackend(2, packed_cache=folder)
    program = opened.program(0, opened.layer_count)
    with closing(backend.load(program, opened.tensors_for(program), LIMITS, lambda done_bytes: None)):
        assert backend.packed_cache is not None
        assert syncs.wait(60) and len(list(folder.path.glob("*.tmp"))) == 1
        started = time.monotonic()
        backend.packed_cache._writer.end()
        assert time.monotonic() - started < 15 and list(folder.path.glob("*.tmp")) == []
        goes_on.set()
        backend.packed_cache.wait()
    assert entries(folder) == [] and images(folder) == []
