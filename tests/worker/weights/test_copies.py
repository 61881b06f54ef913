"""Tests of copies of a model file on several machines, one of them damaged where the model id takes no sample: no
worker computes with bytes that differ from the others'."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.control.remote.model_copies import OwnCopy, chosen_manifest, other_copies
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf import model_file
from llamaclust.model.loader import Model
from llamaclust.model.weights.cache import WeightCache
from llamaclust.model.weights.file_manifests import FileManifest, FileManifests
from llamaclust.wire.control.weights import FindWeights, WeightsFound
from llamaclust.worker.weights.weights import Weights
from support.damaged_models import flip_middle
from support.file_members import alone, members, results
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "m.gguf", hidden=512, ffn=1024, layers=6)


def copy_of(model: Path, folder: Path, damaged: str | None = None) -> Path:
    """Copies the file for another machine, and damages one tensor if named."""
    folder.mkdir()
    copy = Path(shutil.copyfile(model, folder / model.name))
    if damaged is not None:
        flip_middle(copy, damaged)
    return copy


def own_copy(path: Path) -> OwnCopy:
    return OwnCopy(Model.open(path).file)


DAMAGED = {
    "the first stage, its embedding": ("a", "token_embd.weight"),
    "the last stage, its norm": ("b", "output_norm.weight"),
    "a feed-forward matrix": ("b", "blk.4.ffn_up.weight"),
    "a tensor of another stage": ("b", "blk.0.attn_v.weight"),
}


@pytest.mark.parametrize(("worker", "tensor"), DAMAGED.values(), ids=DAMAGED)
async def test_layers_of_a_damaged_copy_are_fetched(model: Path, tmp_path: Path, worker: str, tensor: str) -> None:
    copies = {name: copy_of(model, tmp_path / name, tensor if name == worker else None) for name in "ab"}
    told: list[Event] = []
    async with asyncio.timeout(60), members(tmp_path / "run") as cluster:
        lives = [cluster.start(name, model_dir=copy.parent) for name, copy in copies.items()]
        await cluster.registry.wait_for("ab", 20)
        handles = await cluster.load(model, "ab", (0, 3, 6), own=own_copy(model), report=told.append)
        fetched = {handle.name: handle.stages[1][1].fetched_bytes for handle in handles}
        assert fetched.pop(worker) > 0 and set(fetched.values()) == {0}
        assert await results(cluster, handles, model) == alone(model)
    await asyncio.gather(*lives, return_exceptions=True)
    other = "b" if worker == "a" else "a"
    (notice,) = [event.text for event in told if isinstance(event, Notice)]
    assert notice == (
        f"worker {worker}: its copy of m.gguf differs from the copies of the coordinator and worker {other}: "
        "it is damaged or was changed; it is not used; replace it by a good copy"
    )


async def test_without_a_source_the_error_names_the_copy(model: Path, tmp_path: Path) -> None:
    copy = copy_of(model, tmp_path / "copy", "blk.3.ffn_gate.weight")
    async with asyncio.timeout(60), members(tmp_path / "run") as cluster:
        lives = [cluster.start("a", model_dir=copy.parent)]
        await cluster.registry.wait_for("a", 20)
        with pytest.raises(ModelFileError, match=rf"{copy}: its bytes differ from the cluster's copies"):
            await cluster.load(model, "a", (0, 6), own=own_copy(model))
        flip_middle(copy, "blk.3.ffn_gate.weight")  # repaired in place during the worker's membership
        handles = await cluster.load(model, "a", (0, 6), own=own_copy(model))
        assert await results(cluster, handles, model) == alone(model)
    await asyncio.gather(*lives, return_exceptions=True)


async def test_a_damaged_copy_of_an_adapter_is_not_used(model: Path, tmp_path: Path) -> None:
    adapter = build_adapter(tmp_path / "lora.gguf", model)
    copies = {name: copy_of(model, tmp_path / name) for name in "ab"}
    for copy in copies.values():
        shutil.copyfile(adapter, copy.parent / adapter.name)
    data = bytearray((copies["b"].parent / adapter.name).read_bytes())
    data[-(len(data) // 3)] ^= 0x10
    (copies["b"].parent / adapter.name).write_bytes(data)
    async with asyncio.timeout(60), members(tmp_path / "run") as cluster:
        lives = [cluster.start(name, model_dir=copy.parent) for name, copy in copies.items()]
        await cluster.registry.wait_for("ab", 20)
        own = OwnCopy(Model.open(model).file)
        handles = await cluster.load(model, "ab", (0, 3, 6), adapters=[adapter], own=own)
        assert [handle.stages[1][1].fetched_bytes > 0 for handle in handles] == [False, True]
    await asyncio.gather(*lives, return_exceptions=True)


async def test_one_file_of_all_machines_is_not_read_to_be_compared(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaclust.model.weights.file_manifests.make_manifest", None)
    async with asyncio.timeout(60), members(tmp_path / "run") as cluster:
        lives = [cluster.start(name, model_dir=model.parent) for name in "ab"]
        await cluster.registry.wait_for("ab", 20)
        handles = await cluster.load(model, "ab", (0, 3, 6), own=own_copy(model))
        assert all(handle.stages[1][0].weights is None for handle in handles)
    await asyncio.gather(*lives, return_exceptions=True)


MACHINE = ContextVar("MACHINE", default="first")


@pytest.mark.parametrize(
    ("machines", "remote", "compared"),
    [
        (("first", "second"), False, True),
        (("second", "second"), False, True),
        (("first", "second"), True, False),
        (("first", "first"), False, False),
    ],
    ids=["clones", "clones of the coordinator's", "one of a network", "one machine"],
)
async def test_files_of_cloned_disks_are_copies(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machines: tuple[str, str],
    *,
    remote: bool,
    compared: bool,
) -> None:
    """Files on cloned disks have equal inodes, sizes and times."""
    monkeypatch.setattr(model_file, "machine_id", MACHINE.get)
    monkeypatch.setattr(model_file, "is_remote", lambda path: remote)
    async with asyncio.timeout(60), members(tmp_path / "run") as cluster:
        own, lives = own_copy(model), []
        for name, machine in zip("ab", machines, strict=True):
            token = MACHINE.set(machine)
            lives.append(cluster.start(name, model_dir=model.parent))
            MACHINE.reset(token)
        await cluster.registry.wait_for("ab", 20)
        handles = await cluster.load(model, "ab", (0, 3, 6), own=own)
        assert [handle.stages[1][0].weights is not None for handle in handles] == [compared] * 2
    await asyncio.gather(*lives, return_exceptions=True)


def test_most_files_say_which_bytes_are_computed_with() -> None:
    def has(content: str, file: str) -> WeightsFound:
        return WeightsFound(True, content * 32, 7, gives=True, file=file * 32)

    def remembers(content: str) -> WeightsFound:
        return WeightsFound(False, content * 32, 9, gives=True)

    good, bad = FileManifest("aa" * 32, 7), FileManifest("bb" * 32, 7)
    one_each = {"liar": has("bb", "01"), "a": has("aa", "02")}
    assert chosen_manifest(one_each, good) == good and chosen_manifest(one_each, bad) == bad
    assert chosen_manifest(one_each, None) == bad, "of as many, the first"
    assert chosen_manifest({**one_each, "b": has("aa", "03")}, bad) == bad, "the coordinator's counts, and is first"
    assert chosen_manifest({"a": has("aa", "02"), "b": has("aa", "03")}, bad) == good
    assert chosen_manifest({"liar": has("bb", "01"), "same": has("bb", "01"), "a": has("aa", "02")}, good) == good
    assert chosen_manifest({"c": remembers("bb"), "d": remembers("bb")}, good) == good
    assert chosen_manifest({"c": remembers("bb"), "d": WeightsFound(False)}, None) == replace(bad, n_bytes=9)
    assert chosen_manifest({"d": WeightsFound(False)}, None) is None
    (line,) = other_copies({"a": has("aa", "02"), "b": has("aa", "03")}, bad, good, "/m/m.gguf")
    assert line.startswith("the coordinator's copy of m.gguf differs from the copies of worker a and worker b: ")


@pytest.mark.parametrize("way", ["in place", "with its time set back", "replaced"])
def test_a_manifest_is_of_the_bytes_that_are_there(model: Path, tmp_path: Path, way: str) -> None:
    """The change is detected within a process and by the next process."""
    copy = copy_of(model, tmp_path / "copy")
    wanted = FindWeights(str(copy), Model.open(model).model_id, describe=True)
    cache = WeightCache(tmp_path / "weights", 1 << 30)
    weights = Weights(cache)
    first, was = weights.locate(wanted), copy.stat()
    if way == "replaced":
        moved = shutil.copyfile(copy, tmp_path / "other.gguf")
        flip_middle(moved, "blk.2.attn_q.weight")
        moved.replace(copy)
    else:
        flip_middle(copy, "blk.2.attn_q.weight")
    if way != "in place":
        os.utime(copy, ns=(was.st_atime_ns, was.st_mtime_ns))
    for asked in (weights, Weights(cache), Weights(None)):
        found = asked.locate(wanted)
        assert found.manifest is not None and found.manifest != first.manifest and found.file != first.file
    assert FileManifests(cache).of(Model.open(copy).file).content == found.manifest
