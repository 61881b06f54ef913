"""Tests of the packed-weight cache on disk: equal bits, detection of damage, the size limit, and no partial files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.kernels._native import Memory, available_levels, packing_fingerprint
from llamaclust.kernels.packed import cache
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.kernels.packed.packed_layer import packed_layers_of
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import WIDER_TILES, QuantType
from support.arithmetic.packed_layers import IMAGES, images, run, settled
from support.models.tiny_model import build_tiny_model
from support.paths import TESTS


@pytest.mark.parametrize("mapped", [True, False])
def test_the_second_load_packs_nothing(
    model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    wanted = run(model, None)
    assert run(model, folder) == wanted
    assert len(images(folder)) == IMAGES and len(list(folder.path.glob("*.json"))) == IMAGES
    assert folder.path.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(cache, "in_huge_pages", lambda memories: [mapped] * len(memories))
    monkeypatch.setattr("llamaclust.kernels._native.PackedMatrix.pack_rows", None)
    for level in available_levels():
        assert run(model, folder, level) == wanted


def test_what_is_mapped_is_shared_and_read_only(model: Path, folder: PackedCacheFolder) -> None:
    run(model, folder)
    path = images(folder)[0]
    with path.open("rb") as file:
        memory = Memory.mapped(file.fileno(), path.stat().st_size)
    assert memory.view.tobytes() == path.read_bytes() and not memory.is_writable
    with pytest.raises(ValueError, match="read-only"):
        memory.view[0] = 1
    assert any(path.name in line and " r--s " in line for line in Path("/proc/self/maps").read_text().splitlines())


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def other_size(path: Path) -> None:
    for entry in path.parent.glob("*.json"):
        said = json.loads(entry.read_bytes())
        entry.write_text(json.dumps(said | {"n_bytes": path.stat().st_size}))


def nonsense(path: Path) -> None:
    for entry in path.parent.glob("*.json"):
        entry.write_bytes(b"[1" if entry.name < "8" else b"[1]")


@pytest.mark.parametrize("damage", [flip, cut, other_size, nonsense, Path.unlink])
@pytest.mark.parametrize("mapped", [True, False])
def test_damage_is_found_and_mended(
    model: Path,
    folder: PackedCacheFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    mapped: bool,
) -> None:
    wanted = run(model, folder)
    whole = {path.name: path.read_bytes() for path in images(folder)}
    monkeypatch.setattr(cache, "in_huge_pages", lambda memories: [mapped] * len(memories))
    damage(images(folder)[1])
    assert run(model, folder) == wanted
    assert ("is damaged" in caplog.text) == (damage is flip)
    assert {path.name: path.read_bytes() for path in images(folder)} == whole
    monkeypatch.setattr("llamaclust.kernels._native.PackedMatrix.pack_rows", None)
    assert run(model, folder) == wanted


def test_every_flipped_bit_changes_the_checksum() -> None:
    seed = 20_261_120
    print(f"seed {seed}")
    data = np.random.default_rng(seed).integers(0, 256, 1000, np.uint8)
    memory = Memory(len(data))
    memory.view[:] = data
    found = {memory.checksum()}
    for bit in range(8 * len(data)):
        memory.view[bit // 8] ^= 1 << bit % 8
        found.add(memory.checksum())
        memory.view[bit // 8] ^= 1 << bit % 8
    assert len(found) == 8 * len(data) + 1
    assert memory.checksum() in found
    assert len({Memory(size).checksum() for size in range(300)}) == 300


def test_every_type_packs_in_its_own_way() -> None:
    """IQ4_NL and Q4_0, and BF16 and F16, differ only in how tiles are read."""
    alike = {QuantType.IQ4_NL, QuantType.BF16}
    pairs = [(kind, kind) for kind in SUPPORTED_TYPES if kind not in alike]
    marks = [packing_fingerprint(*pair) for pair in (*pairs, *WIDER_TILES.items())]
    assert len(set(marks)) == len(marks)


def test_another_file_of_that_name_is_packed(model: Path, folder: PackedCacheFolder) -> None:
    before = run(model, folder)
    times = model.stat()
    data = bytearray(model.read_bytes())
    data[-1000] ^= 0x10
    model.write_bytes(data)
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    settled(model)
    after = run(model, None)
    assert run(model, folder) == after != before


def test_a_file_that_may_be_changing_is_not_prepared(model: Path, folder: PackedCacheFolder) -> None:
    later_ns = time.time_ns() + 60 * 10**9  # It never counts as settled, however slow this machine is.
    os.utime(model, ns=(later_ns, later_ns))
    run(model, folder)
    assert images(folder) == []


def test_a_copy_of_the_model_shares_the_images(model: Path, folder: PackedCacheFolder) -> None:
    wanted = run(model, folder)
    before = {path: path.stat() for path in images(folder)}
    folder = PackedCacheFolder(folder.path, folder.used_bytes + 5000)  # no room beyond a few entries
    copy = model.with_name("copy.gguf")
    copy.write_bytes(model.read_bytes())
    assert run(settled(copy), folder) == wanted
    assert len(images(folder)) == IMAGES and len(list(folder.path.glob("*.json"))) == 2 * IMAGES
    assert [(one.model, one.parts) for one in folder.list_models()] == [(str(copy), IMAGES), (str(model), IMAGES)]
    assert folder.list_models()[0].size_bytes == sum(path.stat().st_size for path in images(folder))
    for path, was in before.items():
        assert (path.stat().st_ino, path.stat().st_ctime_ns > was.st_ctime_ns) == (was.st_ino, True)


def test_layers_that_were_not_used_longest_make_room(
    model: Path, folder: PackedCacheFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(model, folder)
    small = PackedCacheFolder(folder.path, folder.used_bytes + 1000)
    entries = {path: json.loads(path.read_bytes())["image"] for path in folder.path.glob("*.json")}
    for age, (path, image) in enumerate(entries.items()):
        os.utime(path, (age, age))
        os.utime(folder.path / f"{image}.tiles", (age + 0.5, age + 0.5))
    first = next(iter(entries))
    assert folder.find(first.stem) is not None  # updates the time of last use
    other = settled(build_tiny_model(model.with_name("o.gguf"), layers=1, quant_type=QuantType.Q4_0, seed=2))
    run(other, small)
    assert small.used_bytes <= small.most_bytes
    order = [*list(entries)[1:], first]
    left = [path for path in order if path.exists()]
    assert left == order[len(order) - len(left) :] and 0 < len(left) < len(order)
    assert {path.stem for path in images(folder)} >= {entries[path] for path in left}
    assert caplog.text == ""


def test_a_model_larger_than_the_room_keeps_what_fits(
    model: Path, folder: PackedCacheFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wanted = run(model, folder)
    half = PackedCacheFolder(folder.path, folder.used_bytes // 2)
    folder.clear()
    for _ in range(2):
        assert run(model, half) == wanted
        assert 0 < len(images(half)) < IMAGES
    assert half.used_bytes <= half.most_bytes
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


LOADER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from support.arithmetic import packed_layers
packed_layers.use_any_disk()
print(packed_layers.run(Path(sys.argv[1]), packed_layers.PackedCacheFolder(Path(sys.argv[2]), 1 << 30)).hex())
"""


def start(model: Path, folder: PackedCacheFolder) -> subprocess.Popen[str]:
    code = LOADER.format(path=[str(TESTS)])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(model), str(folder.path)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_at_once(model: Path, folder: PackedCacheFolder) -> None:
    wanted = run(model, None).hex()
    for _ in range(2):
        processes = [start(model, folder) for _ in range(2)]
        assert [process.communicate(timeout=60)[0].strip() for process in processes] == [wanted] * 2
        assert len(images(folder)) == IMAGES and list(folder.path.glob("*.tmp")) == []


def test_a_process_that_is_killed_leaves_nothing_half_written(tmp_path: Path, folder: PackedCacheFolder) -> None:
    path = settled(build_tiny_model(tmp_path / "m.gguf", hidden=1024, ffn=4096, layers=4, quant_type=QuantType.Q8_0))
    wanted, killed = run(path, None), 0
    for attempt in range(4):
        process = start(path, folder)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(folder.path.glob("*.tmp"))) == 0 and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(0.004 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for image in images(folder):
            assert hashlib.sha256(image.read_bytes()).hexdigest() == image.stem
        assert run(path, folder) == wanted
        assert (
            list(folder.path.glob("*.tmp")) == [] and len(images(folder)) == len(list(folder.path.glob("*.json"))) == 6
        )
        folder.clear()
    assert killed > 0


def test_released_weights_are_not_written(model: Path, folder: PackedCacheFolder) -> None:
    opened = Model.open(model)
    program = opened.program(0, 1)
    found = packed_layers_of(opened.tensors_for(program).values())
    layers = cache.PackedCache(folder)
    folder.create()
    with folder.locked():
        layers._keys = {image: cache.layer_key(image) or "" for image in found}
        memories = {image: Memory(image.n_bytes) for image in found}
        layers.keep(memories)
        del memories
    layers.wait()
    assert len(images(folder)) <= 1  # the layer that was being written


def test_the_command_lists_and_clears(model: Path, folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["model", "cache", *words])
        assert result.exit_code == 0
        return result.stdout

    monkeypatch.setenv("LLAMACLUST_HOME", str(folder.path.parent))
    monkeypatch.setenv("LLAMACLUST_CACHE_SIZE", "5MiB")
    fetched = {"folder": str(folder.path.parent / "weights"), "most_bytes": 0, "tensors": 0}
    fetched |= {"size_bytes": 0, "unfinished_bytes": 0}
    empty = {"fetched": fetched, "models": [], "unfinished": {"files": 0, "size_bytes": 0}, "in_the_way": []}
    empty["kernels"] = {"files": 0, "size_bytes": 0}
    empty["kv_disk"] = {"folder": str(folder.path.parent / "kv"), "size_bytes": 0}
    assert json.loads(said("list", "--json")) == {"folder": str(folder.path), "most_bytes": 5 << 20, **empty}
    assert json.loads(said("clear", "--json"))["files"] == 0
    run(model, folder)
    (listed,) = json.loads(said("list", "--json"))["models"]
    assert (listed["model"], listed["parts"]) == (str(model), IMAGES)
    assert listed["size_bytes"] == sum(path.stat().st_size for path in images(folder))
    assert abs(listed["used_ns"] - time.time_ns()) < 60e9
    assert str(model) in said("list") and "of 5.00 in" in said("list")
    kernels = folder.path.parent / "kernels"
    kernels.mkdir()
    for name in ("rows-1.cubin", "rows-2.ptx", "rows-3.cubin.7-7.tmp"):
        (kernels / name).write_bytes(b"1234")
    assert json.loads(said("list", "--json"))["kernels"] == {"files": 2, "size_bytes": 8}
    assert json.loads(said("list", "--json"))["unfinished"] == {"files": 1, "size_bytes": 4}
    assert "2 files of kernels" in said("list")
    cleared = said("clear")
    assert f"{2 * IMAGES} files" in cleared and "3 files, 0.00 MiB of compiled kernels deleted" in cleared
    assert images(folder) == [] and [path.name for path in kernels.iterdir()] == ["lock"]
