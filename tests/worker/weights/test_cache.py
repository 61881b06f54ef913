"""Tests of the folder of fetched weights: eviction of weights that no load uses, and detection of changed files."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from hashlib import sha256
from io import FileIO
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any

import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.cluster.control.remote.model_copies import OwnCopy
from llamaclust.core.disk_cache.files import BusyError
from llamaclust.core.errors import LlamaclustError, ModelFileError
from llamaclust.model.gguf.writer import header_bytes
from llamaclust.model.loader import Model
from llamaclust.model.weights.cache import MAKING, WeightCache, WeightPart
from llamaclust.model.weights.file_manifests import FileManifests
from llamaclust.model.weights.manifest import make_manifest, read_manifest
from llamaclust.wire.control.weights import FindWeights, WeightSources
from llamaclust.worker.weights.giver import WeightGiver
from llamaclust.worker.weights.remote_file import RemoteFile
from llamaclust.worker.weights.weights import Weights, key_of
from support.models.tiny_model import build_tiny_model
from support.seed import SEED


def put(cache: WeightCache, data: bytes) -> str:
    cache.prepare()
    content = sha256(data).hexdigest()
    part = WeightPart.open(cache, content, len(data))
    assert part is not None
    part.write([data])
    assert part.finish()
    part.close()
    return content


def test_room_is_made_from_what_was_not_used_for_longest_and_is_in_no_load(tmp_path: Path) -> None:
    cache, source = WeightCache(tmp_path / "w", 3000), Random(SEED)
    old, newer = put(cache, source.randbytes(1000)), put(cache, source.randbytes(1000))
    cache.find(old)
    cache.make_room(1500)
    assert cache.find(old) is not None and cache.find(newer) is None
    with cache.in_use():
        held = put(cache, source.randbytes(1000))
        cache.make_room(1500)
        assert cache.find(held) is not None and cache.find(old) is None
        with pytest.raises(
            LlamaclustError, match=r"1 MiB more of weights do not fit: 1 MiB are in use, and the limit is 1 MiB"
        ):
            cache.make_room(2500)
    cache.make_room(2500)
    assert cache.find(held) is None


def test_one_at_a_time_makes_the_manifest_of_a_key(tmp_path: Path) -> None:
    cache, key, inside = WeightCache(tmp_path / "w", 3000), "a" * 64, Lock()
    cache.prepare()

    def make() -> None:
        for _ in range(30):
            with cache.making(key):
                assert inside.acquire(blocking=False)
                time.sleep(1e-4)  # other threads wait meanwhile
                inside.release()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(make) for _ in range(8)]:
            done.result()
    assert [*(tmp_path / "w").iterdir()] == []


def test_a_holder_that_hangs_delays_a_manifest_no_longer_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaclust.model.weights.cache.MAKING_WAIT_S", 0.05)
    cache, key = WeightCache(tmp_path / "w", 3000), "a" * 64
    cache.prepare()
    with cache.making(key):
        with cache.making(key):
            pass
        assert [path.suffix for path in (tmp_path / "w").iterdir()] == [MAKING], "the holder's lock stays"
    assert [*(tmp_path / "w").iterdir()] == []
    (tmp_path / "w" / f"{key}{MAKING}").mkdir()
    what = "weights cannot be stored there: is not a regular file"
    with pytest.raises(LlamaclustError, match=what), cache.making(key):
        pass


def test_a_part_that_is_being_written_is_not_deleted(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "w", 3000)
    cache.prepare()
    data = Random(SEED).randbytes(2000)
    part = WeightPart.open(cache, sha256(data).hexdigest(), 2000)
    assert part is not None
    part.write([data[:1500]])
    with pytest.raises(LlamaclustError, match="the limit is"):
        cache.make_room(2000)
    part.close()
    cache.make_room(2000)
    assert cache.files() == []


class _FailingDisk(FileIO):
    def truncate(self, size: int | None = None, /) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_while_wrong_bytes_are_dropped(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "w", 1 << 20)
    cache.prepare()
    part = WeightPart.open(cache, sha256(b"right").hexdigest(), 5)
    assert part is not None
    part.write([b"wrong"])
    part._file = _FailingDisk(os.dup(part._file.fileno()), "r+")
    with pytest.raises(LlamaclustError, match="input/output error"):
        part.finish()


def test_a_disk_that_fails_while_an_unfinished_tensor_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, content = WeightCache(tmp_path / "w", 1 << 20), sha256(b"right").hexdigest()
    cache.prepare()
    cache.part_path(content).write_bytes(b"too long")
    file = _FailingDisk(cache.part_path(content), "r+")
    monkeypatch.setattr("llamaclust.model.weights.cache.open_own", lambda path, flags: file)
    with pytest.raises(LlamaclustError, match="input/output error; make room there"):
        WeightPart.open(cache, content, 5)
    assert file.closed and not cache.part_path(content).exists()


def test_what_another_process_has_just_finished_is_not_begun_again(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "w", 1 << 20)
    content = put(cache, bytes(1000))
    assert WeightPart.open(cache, content, 1000) is None
    assert not cache.part_path(content).exists() and cache.find(content) is not None


def test_what_was_changed_is_not_there(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "w", 1 << 20)
    content = put(cache, bytes(1000))
    with cache.place(content).open("r+b") as file:
        file.write(b"x")
    assert cache.find(content) is None and not cache.place(content).exists()
    cache.place(content).symlink_to("/etc/passwd")
    assert cache.find(content) is None and not cache.place(content).is_symlink()


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "w", 1 << 20)
    cache.prepare()
    cache.path.chmod(0o777)
    with pytest.raises(LlamaclustError, match=r"weights cannot be stored there: other users may write .* \(mode 777\)"):
        cache.prepare()


def test_the_command_lists_and_clears_fetched_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
    monkeypatch.setenv("LLAMACLUST_WEIGHTS_SIZE", "5MiB")
    cache = WeightCache(tmp_path / "weights", 5 << 20)
    put(cache, bytes(1000))
    listed = json.loads(CliRunner().invoke(app, ["model", "cache", "list", "--json"]).output)["fetched"]
    assert listed == {
        "folder": str(cache.path), "most_bytes": 5 << 20, "tensors": 1, "size_bytes": 1000, "unfinished_bytes": 0
    }  # fmt: skip
    assert "of 5.00 in" in CliRunner().invoke(app, ["model", "cache", "list"]).output
    with cache.in_use():
        refused = CliRunner().invoke(app, ["model", "cache", "clear"])
        assert isinstance(refused.exception, LlamaclustError) and "a load is using the cache" in str(refused.exception)
        with monkeypatch.context() as clock, pytest.raises(BusyError):
            clock.setattr(time, "time_ns", lambda: 0)  # set back after the load began
            cache.clear()
    cleared = json.loads(CliRunner().invoke(app, ["model", "cache", "clear", "--json"]).output)
    assert (cleared["fetched_files"], cleared["fetched_bytes"]) == (1, 1000)
    assert cache.files() == []


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_manifest_says_what_the_file_says(tmp_path: Path, architecture: str) -> None:
    model = Model.open(build_tiny_model(tmp_path / "m.gguf", architecture=architecture, layers=2))
    data = make_manifest(model.file)
    path = tmp_path / "manifest"
    path.write_bytes(data)
    found = read_manifest(path)
    assert make_manifest(model.file) == data and len(data) < 15_000
    assert [(record.name, record.n_bytes) for record in found.tensors] == [
        (name, tensor.n_bytes) for name, tensor in model.file.tensors.items()
    ]
    outline = Model(found.file(Path("/nowhere"), {}))
    assert outline.hyperparameters == model.hyperparameters and outline.model_id == model.model_id
    assert outline.program(0, 2) == model.program(0, 2)
    text = "the people, é\n"
    assert outline.tokenizer.encode(text) == model.tokenizer.encode(text), "grammars need it"
    assert outline.tokenizer.end_of_generation == model.tokenizer.end_of_generation
    assert "tokenizer.chat_template" not in found.metadata
    for record in found.tensors:
        assert sha256(model.file.tensor(record.name).read()).hexdigest() == record.content


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    for metadata in ({}, {"llamaclust.manifest.version": 2}, {"llamaclust.manifest.version": 1}):
        path = tmp_path / "manifest"
        path.write_bytes(header_bytes(metadata))
        with pytest.raises(ModelFileError, match="manifest"):
            read_manifest(path)


def test_a_manifest_is_made_once_for_a_file_until_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=1)
    order = FindWeights(str(path), Model.open(path).model_id, describe=True)
    made: list[Any] = []

    def make(*given: Any) -> Any:
        made.append(given)
        return make_manifest(*given)

    monkeypatch.setattr("llamaclust.model.weights.file_manifests.make_manifest", make)
    first = Weights(WeightCache(tmp_path / "w", 1 << 30)).locate(order)
    assert Weights(WeightCache(tmp_path / "w", 1 << 30)).locate(order) == first and len(made) == 1
    assert first.has_file and first.manifest is not None
    os.utime(path)
    then = Weights(WeightCache(tmp_path / "w", 1 << 30)).locate(order)
    assert (then.manifest, len(made)) == (first.manifest, 2) and then.file != first.file
    found = Weights(None).locate(order)
    assert found.manifest == first.manifest and not found.gives


async def test_a_manifest_that_left_the_cache_is_made_again(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=1)
    order = FindWeights(str(path), Model.open(path).model_id, describe=True)
    cache = WeightCache(tmp_path / "w", 1 << 20)
    weights = Weights(cache)
    own = OwnCopy(Model.open(path).file, FileManifests(cache), weights.giver)
    first = weights.locate(order)
    assert first.manifest is not None and (await own.manifest()).content == first.manifest
    cache.clear()
    assert weights.locate(order) == first and cache.find(first.manifest) is not None
    cache.make_room(cache.most_bytes - 1)
    assert cache.find(first.manifest) is None
    assert await own.gives((await own.manifest()).content) and cache.find(first.manifest) is not None


@pytest.mark.parametrize("waits", ["to enter", "to enter, then cancelled", "to remember"])
async def test_the_event_loop_runs_while_another_process_has_the_lock(waits: str, tmp_path: Path) -> None:
    model = Model.open(build_tiny_model(tmp_path / "m.gguf")).file
    cache, other = WeightCache(tmp_path / "w", 1 << 30), WeightCache(tmp_path / "w", 1 << 30)
    cache.prepare()
    known = WeightSources(put(cache, make_manifest(model)), 1, ())
    file = RemoteFile(str(model.path), model.identity, known, Weights(cache), {}, lambda n_bytes: None)
    async with AsyncExitStack() as stack:
        if waits == "to remember":
            await stack.enter_async_context(file)
        with other.locked():
            waiting = asyncio.create_task(file.outline() if waits == "to remember" else file.__aenter__())
            for _ in range(20):
                await asyncio.sleep(0.005)
            if waits.endswith("cancelled"):
                waiting.cancel()
                await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait((waiting,))
        assert waiting.cancelled() == waits.endswith("cancelled")
        if waits == "to enter":
            stack.push_async_exit(file)
    assert not [*cache.path.glob("*.load")]
    assert (cache.known_manifest(key_of(model.identity)) is None) == (waits != "to remember")


def test_weights_of_a_file_that_is_gone_are_given_from_the_cache(tmp_path: Path) -> None:
    model, cache = build_tiny_model(tmp_path / "m.gguf", layers=1), WeightCache(tmp_path / "w", 1 << 30)
    giver = WeightGiver(cache)
    with Model.open(model) as opened:
        tensor = opened.file.tensor("blk.0.attn_q.weight")
        data = bytearray(tensor.n_bytes)
        tensor.read_into(data, 0)
        content = sha256(data).hexdigest()
        giver._tensors[content] = tensor
    assert giver._read(content, 0, len(data)) == data
    model.unlink()
    with pytest.raises(ModelFileError, match="no such file"):
        giver._read(content, 0, len(data))
    put(cache, bytes(data))
    assert [giver._read(content, 1, len(data)) for _ in range(2)] == [data[1:]] * 2
