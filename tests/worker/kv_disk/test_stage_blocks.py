"""Tests of KV blocks on disk: restored bytes are equal, damaged blocks are never restored, and the folder's size is
bounded."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from hashlib import sha256
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.disk_cache import files as disk_files
from llamaclust.worker.kv_disk.folder import KvFolder
from llamaclust.worker.kv_disk.kv_file import KvFile
from llamaclust.worker.kv_disk.stage_blocks import KvTraffic, StageBlocks

BLOCKS = 24
SIZES = ((96,), (40, 24), (), (96, 8, 200))  # bytes of a block's keys, values and states, by layer
BLOCK_BYTES = sum(map(sum, SIZES))
CONTENT = "ab" * 32
KEYS = [sha256(bytes([number])).digest() for number in range(BLOCKS)]

Kv = list[list[NDArray[np.uint8]]]


def memory(seed: int, start: int = 0, end: int = len(SIZES)) -> Kv:
    """Returns KV memory of layers [start, end), equal for every cut."""
    sources = (np.random.default_rng(seed + layer) for layer in range(len(SIZES)))
    whole = [
        [source.integers(0, 256, (BLOCKS, n), np.uint8) for n in parts]
        for source, parts in zip(sources, SIZES, strict=True)
    ]
    return whole[start:end]


def blank(start: int = 0, end: int = len(SIZES)) -> Kv:
    return [[np.zeros((BLOCKS, n), np.uint8) for n in parts] for parts in SIZES[start:end]]


def stage(path: Path, start: int = 0, most_bytes: int = 1 << 20) -> StageBlocks:
    """Opens the folder like a new process."""
    folder = KvFolder(path / "kv", most_bytes)
    folder.create()
    return StageBlocks(folder, CONTENT, start, KvTraffic())


def files(path: Path) -> list[Path]:
    return sorted((path / "kv").glob("*.*"))


def assert_same(restored: Kv, kv: Kv, pairs: Sequence[tuple[int, int]]) -> None:
    for layer, wanted_layer in zip(restored, kv, strict=True):
        for found, wanted in zip(layer, wanted_layer, strict=True):
            for to, source in pairs:
                assert (found[to] == wanted[source]).all()


def test_what_was_saved_is_restored_by_another_process(tmp_path: Path) -> None:
    kv, blocks = memory(1), [5, 3, 9]
    assert stage(tmp_path).save(KEYS[:3], blocks, kv) == 3
    other, restored = stage(tmp_path), blank()
    assert other.find(KEYS[:5], restored) == 3
    assert other.restore(KEYS[:3], [1, 2, 3], restored) == 3
    assert_same(restored, kv, [(1, 5), (2, 3), (3, 9)])
    assert [oct(file.stat().st_mode & 0o777) for file in files(tmp_path)] == ["0o600"]
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    kv, one = memory(1), stage(tmp_path)
    one.save(KEYS[:4], [0, 1, 2, 3], kv)
    size = files(tmp_path)[0].stat().st_size
    assert one.save(KEYS[:4], [0, 1, 2, 3], kv) == 4
    assert stage(tmp_path).save(KEYS[:6], [2, 3, 4, 5], kv) == 4
    assert sorted(file.stat().st_size for file in files(tmp_path))[0] < size
    restored = blank()
    assert one.find(KEYS, restored) == 6
    assert one.restore(KEYS[:6], [0, 1, 2, 3, 4, 5], restored) == 6
    assert_same(restored, kv, [(number, number) for number in range(6)])


@pytest.mark.parametrize("cut", [(0, 4), (1, 4), (0, 2), (2, 3)], ids=str)
def test_other_cuts_of_the_model_find_their_layers(tmp_path: Path, cut: tuple[int, int]) -> None:
    for start, end in ((0, 1), (1, 3), (3, 4)):
        assert stage(tmp_path, start).save(KEYS[:2], [7, 8], memory(1, start, end)) == 2
    restored = blank(*cut)
    one = stage(tmp_path, cut[0])
    assert one.find(KEYS[:2], restored) == 2
    assert one.restore(KEYS[:2], [7, 8], restored) == 2
    assert_same(restored, memory(1, *cut), [(7, 7), (8, 8)])


def test_a_block_without_some_layer_is_not_there(tmp_path: Path) -> None:
    stage(tmp_path, 0).save(KEYS[:2], [0, 1], memory(1, 0, 2))
    stage(tmp_path, 3).save(KEYS[:2], [0, 1], memory(1, 3, 4))
    assert stage(tmp_path).find(KEYS[:2], blank()) == 0
    assert stage(tmp_path).restore(KEYS[:2], [0, 1], blank()) == 0


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """No damaged block is reported as restored, whichever bit is flipped, and the damaged file is deleted."""
    kv, source = memory(1), np.random.default_rng(3)
    stage(tmp_path).save(KEYS[:3], [0, 1, 2], kv)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    header = len(whole) - 3 * BLOCK_BYTES
    places = [*range(0, header, 7), *source.integers(header, len(whole), 60)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(source.integers(8))
        file.write_bytes(damaged)
        restored, one = blank(), stage(tmp_path)
        one.find(KEYS[:3], restored)
        done = one.restore(KEYS[:3], [0, 1, 2], restored)
        assert done < 3, place
        assert_same(restored, kv, [(number, number) for number in range(done)])
        assert not file.exists()
        assert one.find(KEYS[:3], restored) == 0


@pytest.mark.parametrize("left", [0, 3, 30, 500, -1])
def test_a_truncated_file_is_no_file(tmp_path: Path, left: int) -> None:
    stage(tmp_path).save(KEYS[:3], [0, 1, 2], memory(1))
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:left])
    one = stage(tmp_path)
    assert one.find(KEYS[:3], blank()) == 0
    assert files(tmp_path) == []


def test_a_file_truncated_after_it_was_found_restores_nothing_damaged(tmp_path: Path) -> None:
    kv, one, restored = memory(1), stage(tmp_path), blank()
    one.save(KEYS[:3], [0, 1, 2], kv)
    (file,) = files(tmp_path)
    os.truncate(file, file.stat().st_size - 1)
    assert one.restore(KEYS[:3], [0, 1, 2], restored) == 2
    assert_same(restored, kv, [(0, 0), (1, 1)])


def test_a_file_under_the_name_of_another_layer_or_key_is_not_used(tmp_path: Path) -> None:
    """Digests also cover the key and the layer, so swapped blocks are detected."""
    stage(tmp_path).save(KEYS[:2], [0, 1], memory(1))
    (file,) = files(tmp_path)
    whole = bytearray(file.read_bytes())
    half = BLOCK_BYTES
    whole[-2 * half :] = whole[-half:] + whole[-2 * half : -half]
    file.write_bytes(whole)
    assert stage(tmp_path).find(KEYS[:2], blank()) == 2
    one = stage(tmp_path)
    one.find(KEYS[:2], blank())
    assert one.restore(KEYS[:2], [0, 1], blank()) == 0


def test_a_chain_is_not_deleted_for_its_own_end(tmp_path: Path) -> None:
    kv = memory(1)
    probe = stage(tmp_path / "probe")
    probe.save(KEYS[:1], [0], kv)
    size = files(tmp_path / "probe")[0].stat().st_size
    one = stage(tmp_path, most_bytes=2 * size)
    assert [one.save(KEYS[: number + 1], [number], kv) for number in range(4)] == [1, 1, 0, 0]
    assert one.find(KEYS, kv) == 2


def test_the_end_of_a_chain_that_is_read_in_pieces_is_deleted_first(tmp_path: Path) -> None:
    kv = memory(1)
    probe = stage(tmp_path / "probe")
    probe.save(KEYS[:1], [0], kv)
    one = stage(tmp_path, most_bytes=3 * files(tmp_path / "probe")[0].stat().st_size)
    assert [one.save(KEYS[: number + 1], [number], kv) for number in range(3)] == [1, 1, 1]
    assert one.find(KEYS[:3], kv) == 3
    assert [one.restore([KEYS[number]], [number], blank()) for number in range(3)] == [1, 1, 1]
    assert one.save(KEYS[5:6], [5], kv) == 1
    assert 1 <= one.find(KEYS[:3], kv) < 3, "the beginning is there"


def test_a_full_disk_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kv, one = memory(1), stage(tmp_path)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(disk_files, "_write_all", full)
            assert [one.save(KEYS[:2], [0, 1], kv) for _ in range(3)] == [0, 0, 0]
        assert [record.getMessage() for record in caplog.records] == [
            "KV memory is not written to disk: No space left on device"
        ]
        assert files(tmp_path) == []
        caplog.clear()
        assert one.save(KEYS[:2], [0, 1], kv) == 2
        KvFolder(tmp_path / "kv", 0).clear()


def test_a_file_that_cannot_be_read_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad sector or changed permissions make a file unreadable."""
    kv = memory(1)
    stage(tmp_path).save(KEYS[:2], [0, 1], kv)
    (bad,) = files(tmp_path)
    stage(tmp_path).save(KEYS[:4], [2, 3], kv)
    read = KvFile.read

    def read_or_fail(name: str, file: FileIO) -> KvFile:
        if name == bad.name:
            raise OSError(errno.EIO, "Input/output error", name)
        return read(name, file)

    monkeypatch.setattr(KvFile, "read", read_or_fail)
    one = stage(tmp_path)
    assert one.find(KEYS[2:4], kv) == one.find(KEYS[2:4], kv) == 2
    assert caplog.text.count("Input/output error") == 1
    monkeypatch.undo()
    assert one.find(KEYS, kv) == 4


def test_a_block_that_is_in_a_file_twice_is_forgotten_once(tmp_path: Path) -> None:
    one, kv = stage(tmp_path), memory(1)
    one.save([KEYS[0], KEYS[0]], [0, 1], kv)
    (file,) = files(tmp_path)
    assert one.find(KEYS[:1], kv) == 1
    file.unlink()
    assert one.find(KEYS[:1], kv) == 0


def test_a_file_of_other_sizes_hides_no_other(tmp_path: Path) -> None:
    """The wrong file covers more layers than the right one."""
    wrong = [[np.zeros((BLOCKS, n + 8), np.uint8) for n in parts] for parts in SIZES]
    assert stage(tmp_path).save(KEYS[:1], [0], wrong) == 1
    kv = memory(7)
    assert stage(tmp_path).save(KEYS[:1], [2], kv[:2]) == 1
    assert stage(tmp_path, 2).save(KEYS[:1], [2], kv[2:]) == 1
    whole, restored = stage(tmp_path), blank()
    assert whole.find(KEYS[:1], restored) == whole.restore(KEYS[:1], [1], restored) == 1
    assert_same(restored, kv, [(1, 2)])
