"""Tests of weights from other workers: resumed, checked, and fetched from another worker if one sends wrong bytes."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random

import pytest

from llamaclust.core.errors import LlamaclustError, WorkerError
from llamaclust.model.loader import Model
from llamaclust.model.weights.cache import WeightCache, WeightPart
from llamaclust.wire.rpc.server import ServerStream
from llamaclust.wire.weight_stream import FRAME_BYTES, WeightRange, frames_of
from llamaclust.worker.weights.fetch import WeightFetch
from support.clusters.served import until
from support.clusters.weight_peers import Answer, fetch, holder, manifest_of, wanted
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

ROOM = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "m.gguf", hidden=512, ffn=1024, layers=2)


def contents(cache: WeightCache) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in cache.path.glob("*.weights")}


def check(cache: WeightCache) -> None:
    """Checks that each file's content has the digest in its name."""
    assert all(sha256(data).hexdigest() == name for name, data in contents(cache).items())


async def test_all_tensors_come_once_from_several_peers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("w")
    cache = WeightCache(folder / "cache", ROOM)
    async with holder(model, folder / "a") as a, holder(model, folder / "b") as b:
        what = wanted(manifest_of(a, model))
        assert await fetch(cache, [a, b], what) == sum(tensor.n_bytes for tensor in what)
        assert a.weights.giver.sent_bytes > 0 and b.weights.giver.sent_bytes > 0
        assert await fetch(cache, [a, b], what) == 0
    check(cache)
    opened = Model.open(model).file
    assert contents(cache) == {tensor.content: opened.tensor(tensor.name).read() for tensor in what}


async def test_a_cut_link_is_resumed_from_the_bytes_that_are_there(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    cache = WeightCache(folder / "cache", ROOM)
    cuts: dict[str, int] = {}

    async with holder(model, folder / "good") as good:
        what = wanted(manifest_of(good, model), "ffn")

        async def cut(stream: ServerStream, asked: WeightRange) -> None:
            """Breaks the link after one frame, once per tensor of several frames."""
            if asked.end - asked.start > FRAME_BYTES and asked.content not in cuts:
                cuts[asked.content] = asked.start + FRAME_BYTES
                data = good.weights.giver._read(asked.content, asked.start, asked.start + FRAME_BYTES)
                await stream.write(next(iter(frames_of(memoryview(data)))))
                raise LlamaclustError("cut")
            await good.weights.giver._give(stream, asked)

        async with holder(model, folder / "bad", cut) as bad:
            came = await fetch(cache, [bad], what)
    assert len(cuts) == len([tensor for tensor in what if tensor.n_bytes > FRAME_BYTES]) > 2
    assert came == sum(tensor.n_bytes for tensor in what)
    assert {(wanted_range.content, wanted_range.start) for wanted_range in bad.asked} >= set(cuts.items())
    check(cache)


async def test_a_peer_that_ends_in_the_middle_is_resumed_at_another(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    cache = WeightCache(folder / "cache", ROOM)
    first = asyncio.Event()

    async with holder(model, folder / "good") as good:
        what = wanted(manifest_of(good, model), "blk.0.ffn_down")

        async def stall(stream: ServerStream, asked: WeightRange) -> None:
            data = good.weights.giver._read(asked.content, asked.start, asked.start + FRAME_BYTES)
            await stream.write(next(iter(frames_of(memoryview(data)))))
            await asyncio.sleep(60)

        async with holder(model, folder / "bad", stall) as bad:
            getting = asyncio.create_task(fetch(cache, [bad, good], what, lambda n_bytes: first.set()))
            await first.wait()
            await bad.server.stop(0.0)
            came = await getting
    assert came == what[0].n_bytes
    assert [wanted_range.start for wanted_range in good.asked] == [FRAME_BYTES]
    check(cache)


async def _flip(good: Callable[[str, int, int], bytearray], stream: ServerStream, asked: WeightRange) -> None:
    data = good(asked.content, asked.start, asked.end)
    data[len(data) // 2] ^= 0x10
    for frame in frames_of(memoryview(data)):
        await stream.write(frame)


async def test_a_flipped_bit_is_refused_and_the_tensor_comes_from_elsewhere(
    model: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path_factory.mktemp("w")
    cache = WeightCache(folder / "cache", ROOM)
    async with holder(model, folder / "good") as good:
        what = wanted(manifest_of(good, model))

        async def flip(stream: ServerStream, asked: WeightRange) -> None:
            await _flip(good.weights.giver._read, stream, asked)

        async with holder(model, folder / "bad", flip) as bad:
            await fetch(cache, [bad, good], what)
            assert len(bad.asked) in (1, 2)  # from the two streams in progress
            assert {wanted_range.content for wanted_range in bad.asked} <= {
                wanted_range.content for wanted_range in good.asked
            }
            with pytest.raises(WorkerError, match=r"not available .holder 0: .*its bytes do not have SHA-256"):
                await fetch(WeightCache(folder / "alone", ROOM), [bad], what)
    check(cache)
    assert len(contents(cache)) == len({tensor.content for tensor in what})
    assert "no more weights from holder 0" in caplog.text


async def _short(stream: ServerStream, asked: WeightRange) -> None:
    await stream.write(b"\x01" + bytes(FRAME_BYTES - 1))


async def _long(stream: ServerStream, asked: WeightRange) -> None:
    await stream.write(b"\x01" + bytes(FRAME_BYTES + 1))


async def _empty(stream: ServerStream, asked: WeightRange) -> None:
    while True:
        await stream.write(b"\x01")


async def _endless(stream: ServerStream, asked: WeightRange) -> None:
    while True:
        await stream.write(b"\x01" + bytes(FRAME_BYTES))


async def _no_frame(stream: ServerStream, asked: WeightRange) -> None:
    await stream.write(b"")


async def _unknown_kind(stream: ServerStream, asked: WeightRange) -> None:
    await stream.write(b"\x07" + bytes(FRAME_BYTES))


async def _long_reason(stream: ServerStream, asked: WeightRange) -> None:
    await stream.write(b"\x00" + b"x" * 100_000)


async def _silent(stream: ServerStream, asked: WeightRange) -> None:
    await asyncio.sleep(60)


async def _other_tensor(stream: ServerStream, asked: WeightRange) -> None:
    for frame in frames_of(memoryview(Random(SEED).randbytes(asked.end - asked.start))):
        await stream.write(frame)


HOSTILE: list[Answer] = [
    _short, _long, _empty, _endless, _no_frame, _unknown_kind, _long_reason, _silent, _other_tensor
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda function: function.__name__)
async def test_a_hostile_peer_costs_nothing_but_time(
    model: Path, tmp_path_factory: pytest.TempPathFactory, answer: Answer
) -> None:
    folder = tmp_path_factory.mktemp("w")
    cache = WeightCache(folder / "cache", ROOM)
    async with holder(model, folder / "good") as good, holder(model, folder / "bad", answer) as bad:
        what = wanted(manifest_of(good, model))
        await fetch(cache, [bad, good], what)
        assert bad.asked
        check(cache)
        assert len(contents(cache)) == len({tensor.content for tensor in what})
        assert not list(cache.path.glob("*.part"))
        with pytest.raises(WorkerError, match=r"not available .holder 0: "):
            await fetch(WeightCache(folder / "alone", ROOM), [bad], what[:1])


async def test_a_peer_refuses_ranges_that_it_does_not_have(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    async with holder(model, folder / "a") as a:
        tensor = wanted(manifest_of(a, model))[0]
        with pytest.raises(WorkerError, match=r"not available .holder 0: does not have it"):
            unknown = type(tensor)(sha256(b"?").hexdigest(), 10, "x")
            await fetch(WeightCache(folder / "b", ROOM), [a], [unknown])
        with pytest.raises(WorkerError, match=r"not available .holder 0: does not have it"):
            too_long = type(tensor)(tensor.content, tensor.n_bytes + 1, "x")
            await fetch(WeightCache(folder / "c", ROOM), [a], [too_long])
        assert a.weights.giver.sent_bytes == 0


async def test_two_fetches_share_a_folder_and_each_tensor_comes_once(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    async with holder(model, folder / "a") as a:
        what = wanted(manifest_of(a, model))
        both = [fetch(WeightCache(folder / "cache", ROOM), [a], what) for _ in range(2)]
        assert sum(await asyncio.gather(*both)) == sum(tensor.n_bytes for tensor in what)
    check(WeightCache(folder / "cache", ROOM))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a file system of 2 MiB, or skips the test if mounting is not allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = os.geteuid() == 0 and (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", path], check=False).returncode == 0
    )
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)  # broken streams may still close files of it


async def test_a_full_disk_is_one_error_before_anything_is_fetched(tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = WeightCache(tmp_path_factory.mktemp("w"), 1 << 60)
    with pytest.raises(
        LlamaclustError, match=r"the disk has \d+ MiB free, but 1073741824 MiB more of weights are needed"
    ):
        cache.make_room(1 << 50)


async def test_a_disk_that_becomes_full_leaves_nothing_that_is_taken_for_whole(
    model: Path, small_disk: Path, tmp_path: Path
) -> None:
    cache = WeightCache(small_disk / "cache", ROOM)
    async with holder(model, tmp_path / "a") as a:
        what = wanted(manifest_of(a, model))
        with pytest.raises(LlamaclustError, match="of weights cannot be written: no space left on device"):
            await fetch(cache, [a], what)
    check(cache)
    assert len(contents(cache)) < len({tensor.content for tensor in what})


async def test_a_file_that_may_not_grow_is_an_error_too(model: Path, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", ROOM)
    async with holder(model, tmp_path / "a") as a:
        what = wanted(manifest_of(a, model), "token_embd")
        with ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            with pytest.raises(LlamaclustError, match="of weights cannot be written: file too large"):
                await fetch(cache, [a], what)
        assert not contents(cache) and not list(cache.path.glob("*.part"))
        assert await fetch(cache, [a], what) == what[0].n_bytes


def test_a_part_is_written_by_one_at_a_time_and_resumed(tmp_path: Path) -> None:
    cache, data = WeightCache(tmp_path / "cache", ROOM), Random(SEED).randbytes(5000)
    cache.prepare()
    content = sha256(data).hexdigest()
    part = WeightPart.open(cache, content, 5000)
    assert part is not None and not part.resumed
    assert WeightPart.open(cache, content, 5000) is None
    part.write([data[:1000], data[1000:1500]])
    assert not part.finish()  # incomplete: it begins again
    part.write([data[:1500]])
    part.close()
    again = WeightPart.open(cache, content, 5000)
    assert again is not None and again.resumed and again.done_bytes == 1500
    again.write([data[1500:]])
    assert again.finish()
    again.close()
    assert cache.place(content).read_bytes() == data and not cache.part_path(content).exists()


@pytest.mark.parametrize("is_cancelled", [True, False], ids=["is cancelled", "fails"])
async def test_a_source_that_is_renewed_while_a_fetch_ends_is_not_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    begun, released, calls = threading.Event(), threading.Event(), count()

    def finish(part: WeightPart) -> bool:
        if next(calls) == 0 and not is_cancelled:
            begun.wait()
            raise LlamaclustError("the disk is full")
        begun.set()
        released.wait()
        return True

    monkeypatch.setattr(WeightPart, "finish", finish)
    cache = WeightCache(tmp_path / "cache", ROOM)
    async with holder(model, tmp_path / "a") as a:
        peer = a.peer
        fetching = WeightFetch(cache, [("a", peer)], lambda n_bytes: None, lambda n_bytes: None)
        try:
            with cache.in_use():
                running = asyncio.create_task(fetching.run(wanted(manifest_of(a, model), "ffn")))
                assert await asyncio.to_thread(begun.wait, 60)
                lanes = fetching._sources[0].lanes
                if is_cancelled:
                    running.cancel()
                await until(lambda: any(lane.cancelling() for lane in lanes))
                fetching.renew("a", peer)
                released.set()
                with pytest.raises(asyncio.CancelledError if is_cancelled else LlamaclustError):
                    await running
            assert not fetching._sources[0].lanes
        finally:
            released.set()
            await peer.close()
