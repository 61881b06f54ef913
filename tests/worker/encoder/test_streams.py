"""Tests of a worker's encode streams in this process, over real connections, with local and fetched files."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event, get_native_id
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamaclust.cluster.control.remote.encoder import RemoteEncoder
from llamaclust.cluster.control.remote.model_copies import OwnCopy
from llamaclust.cluster.control.weight_sources import WantedBytes
from llamaclust.cluster.engine.pipeline import EncoderUnreachableError, TileTask
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import DeadlineError, InsufficientMemoryError, RequestError
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.projectors.projector import open_projector
from llamaclust.wire.encoder import COMPUTING, encode_tile
from llamaclust.wire.rpc.client import Peer, StreamBrokenError
from llamaclust.wire.rpc.methods import ENCODE
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.encoder_limits import ENCODER_NICENESS, EncoderMemory
from llamaclust.worker.encoder.streams import EncoderStreams
from llamaclust.worker.encoder.tile_encoder import TileEncoder
from llamaclust.worker.service import StageService
from llamaclust.worker.stage.compute import Compute
from support.clusters.served import until
from support.damaged_models import flip_middle
from support.file_members import Members, alone, members, projector_at, results
from support.models.tiny_model import build_tiny_model
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import build_projector, tile_of

NAME = "qwen3vl_merger"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    build_tiny_model(folder / "m.gguf", layers=2)
    build_projector(folder / "mmproj-m.gguf", NAME)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> Float32:
    return encoded(CpuBackend(1), folder / "mmproj-m.gguf", tile_of(NAME))


async def load(
    cluster: Members, folder: Path, wanted: WantedBytes | None, names: str = "a", epoch: int = 1, *, again: bool = False
) -> tuple[WorkerHandle, ...]:
    model = folder / "m.gguf"
    cuts = (0, 2) if len(names) == 1 else (0, 1, 2)
    return await cluster.load(model, list(names), cuts, str(model), encoder=wanted, epoch=epoch, is_exclusive=again)


def beside(folder: Path) -> WantedBytes:
    """Returns the projector file in the folder."""
    path = folder / "mmproj-m.gguf"
    return projector_at(str(path), path, folder / "m.gguf")


def task(rows: Float32, seed: int = 5) -> TileTask:
    return TileTask(tile_of(NAME, seed), *rows.shape)


class Held:
    """Blocks all encoders of this process while they compute a tile."""

    def __init__(self) -> None:
        self.tiles = 0  # that have begun
        self.begun, self.gate = Event(), Event()

    async def entered(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 20.0)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held, rows = Held(), TileEncoder.rows

    def hold(encoder: TileEncoder, tile: Any) -> Float32:
        held.tiles += 1
        held.begun.set()
        assert held.gate.wait(60)
        return rows(encoder, tile)

    monkeypatch.setattr(TileEncoder, "rows", hold)
    yield held
    held.gate.set()


@asynccontextmanager
async def workers(folder: Path, names: Sequence[str] = "a", **starts: Path) -> AsyncIterator[Members]:
    """Runs workers; `starts` contains the folders of their model files by name."""
    async with asyncio.timeout(60), members(folder) as cluster:
        lives = [cluster.start(name, model_dir=starts.get(name)) for name in names]
        await cluster.registry.wait_for(names, 20)
        yield cluster
    await asyncio.gather(*lives, return_exceptions=True)


def peer_of(cluster: Members, name: str) -> Peer:
    worker = cluster.registry.workers[name]
    return Peer(worker.registration.address, cluster.run.token, Principal(name))


async def encoded_by(cluster: Members, *tasks: TileTask, name: str = "a", epoch: int = 1) -> list[Float32]:
    peer = peer_of(cluster, name)
    try:
        return [await RemoteEncoder(epoch, peer).rows(task) for task in tasks]
    finally:
        await peer.close()


def same(found: Float32, wanted: Float32) -> None:
    np.testing.assert_array_equal(found.view("u4"), wanted.view("u4"))


async def test_rows_have_the_bits_of_the_reference(folder: Path, rows: Float32, tmp_path: Path) -> None:
    path = folder / "mmproj-m.gguf"
    async with workers(tmp_path, "ab") as cluster:
        first, last = (handle.stages[1][1] for handle in await load(cluster, folder, beside(folder), "ab"))
        assert (first.encoder_bytes, last.fetched_bytes) == (0, 0)
        assert last.encoder_bytes > open_projector(path).file.size_bytes
        for found in await encoded_by(cluster, task(rows), task(rows), name="b"):
            same(found, rows)
        others = await asyncio.gather(*(encoded_by(cluster, task(rows, seed), name="b") for seed in range(6)))
        for seed, (found,) in enumerate(others):
            same(found, encoded(CpuBackend(1), path, tile_of(NAME, seed)))
        with pytest.raises(EncoderUnreachableError, match=r"worker a holds no image encoder for epoch 0\.1"):
            await encoded_by(cluster, task(rows))


async def test_the_stage_computes_beside_a_tile(folder: Path, rows: Float32, tmp_path: Path, held: Held) -> None:
    async with workers(tmp_path) as cluster:
        handles = await load(cluster, folder, beside(folder))
        encoding = asyncio.create_task(encoded_by(cluster, task(rows)))
        await held.entered()
        assert await results(cluster, handles, folder / "m.gguf") == alone(folder / "m.gguf")
        held.gate.set()
        same((await encoding)[0], rows)


async def test_tiles_have_a_low_priority(
    folder: Path, rows: Float32, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, computed = list[int](), TileEncoder.rows

    def noted(encoder: TileEncoder, tile: Any) -> Float32:
        found.append(os.getpriority(os.PRIO_PROCESS, get_native_id()))
        return computed(encoder, tile)

    monkeypatch.setattr(TileEncoder, "rows", noted)
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        same((await encoded_by(cluster, task(rows)))[0], rows)
    assert found == [min(os.getpriority(os.PRIO_PROCESS, 0) + ENCODER_NICENESS, 19)]


async def test_tiles_wait_for_each_other_and_cancelled_ones_cost_nothing(
    folder: Path, rows: Float32, tmp_path: Path, held: Held
) -> None:
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        first, second, third = (asyncio.create_task(encoded_by(cluster, task(rows, seed))) for seed in (5, 6, 5))
        await held.entered()
        second.cancel()
        await asyncio.wait((second,))
        held.gate.set()
        for encoding in (first, third):
            same((await encoding)[0], rows)
        assert held.tiles == 2


async def test_a_tile_in_progress_keeps_its_turn_when_its_stream_is_cancelled() -> None:
    gate, begun = Event(), list[int]()

    def rows(tile: np.ndarray) -> Float32:
        begun.append(int(tile[0, 0, 0]))
        assert gate.wait(60)
        return np.ones((1, 4), np.float32)

    encoder: Any = SimpleNamespace(rows=rows, close=lambda: None)
    streams = EncoderStreams(encoder, Compute(inline=False))
    first, second, third = (
        asyncio.create_task(streams._answer(np.full((1, 1, 3), number, np.uint8))) for number in range(3)
    )
    async with asyncio.timeout(60):
        await until(lambda: begun == [0])
        for cancelled in (first, second):
            cancelled.cancel()
            await asyncio.wait((cancelled,))
        gate.set()
        assert len([*await third]) == 1
        assert not streams.is_computing
        await streams.close()
    assert begun == [0, 2]


async def test_the_encoder_ends_with_its_epoch(folder: Path, rows: Float32, tmp_path: Path, held: Held) -> None:
    """The tile continues; a load waits for its memory only if it needs that memory."""
    async with workers(tmp_path) as cluster:
        (handle,) = await load(cluster, folder, beside(folder))
        encoding = asyncio.create_task(encoded_by(cluster, task(rows)))
        await held.entered()
        await handle.unload(1)
        with pytest.raises(StreamBrokenError):
            await encoding
        with pytest.raises(EncoderUnreachableError, match="worker a holds no image encoder"):
            await encoded_by(cluster, task(rows))
        await load(cluster, folder, beside(folder), epoch=2)
        await handle.unload(2)
        waits, last_tiles = asyncio.Event(), StageService.last_tiles

        async def waited(service: StageService) -> bool:
            waits.set()
            return await last_tiles(service)

        with pytest.MonkeyPatch.context() as patched:
            free_bytes = property(lambda _: 1 << 40 if held.gate.is_set() else 0)
            patched.setattr(Device, "free_memory_bytes", free_bytes)
            patched.setattr(StageService, "last_tiles", waited)
            loading = asyncio.create_task(load(cluster, folder, beside(folder), epoch=3))
            await asyncio.wait((loading, asyncio.create_task(waits.wait())), return_when=asyncio.FIRST_COMPLETED)
            assert not loading.done()
            held.gate.set()
            await loading
        same((await encoded_by(cluster, task(rows), epoch=3))[0], rows)


async def test_the_next_epoch_takes_the_encoder_over_in_mid_tile(
    folder: Path, rows: Float32, tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        encoding = asyncio.create_task(encoded_by(cluster, task(rows)))
        await held.entered()
        monkeypatch.setattr("llamaclust.worker.loads.load_encoder", None)  # must not be loaded again
        await load(cluster, folder, beside(folder), epoch=2, again=True)
        with pytest.raises(StreamBrokenError):
            await encoding
        encoding = asyncio.create_task(encoded_by(cluster, task(rows, 6), epoch=2))
        assert not (await asyncio.wait((encoding,), timeout=0.05))[0] and held.tiles == 1, "two tiles at once"
        held.gate.set()
        same((await encoding)[0], encoded(CpuBackend(1), folder / "mmproj-m.gguf", tile_of(NAME, 6)))


async def test_a_long_tile_shows_that_it_is_computed(
    folder: Path, rows: Float32, tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaclust.worker.encoder.streams._COMPUTING_S", 0.01)
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        peer = peer_of(cluster, "a")
        stream = peer.open(ENCODE, epoch=1)
        await stream.write(encode_tile(tile_of(NAME)))
        for _ in range(3):
            assert await stream.read() == COMPUTING
        encoding = asyncio.create_task(encoded_by(cluster, task(rows)))
        held.gate.set()
        same((await encoding)[0], rows)
        await peer.close()


async def test_a_worker_that_shows_nothing_is_given_up(
    folder: Path, rows: Float32, tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaclust.cluster.control.remote.encoder._FRAME_S", 0.05)
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        with pytest.raises(DeadlineError, match=r"an encoded image from worker a took longer than 0\.05 s") as caught:
            await encoded_by(cluster, task(rows))
        assert caught.value.worker == "a"
        held.gate.set()


async def test_a_silent_stream_ends_soon(
    folder: Path, rows: Float32, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream also ends after a tile; once a tile's first bytes have arrived, the limit no longer applies."""
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        peer = peer_of(cluster, "a")
        used = peer.open(ENCODE, epoch=1)
        for limit_s in (None, 0.5):  # The wait for the first tile begins under the usual limit.
            if limit_s is not None:
                monkeypatch.setattr("llamaclust.worker.encoder.streams._BEGIN_S", limit_s)
            await used.write(encode_tile(tile_of(NAME)))
            assert await used.read() == b"\1" + rows.tobytes()
        silent = peer.open(ENCODE, epoch=1)
        await silent.opened()
        for stream in (silent, used):
            with pytest.raises(StreamBrokenError, match=r"first bytes of an image tile took longer than 0\.5 s"):
                await stream.read()
        await peer.close()


async def test_a_load_in_its_place_has_an_encoder_of_its_own(folder: Path, rows: Float32, tmp_path: Path) -> None:
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        await load(cluster, folder, beside(folder), epoch=2, again=True)
        same((await encoded_by(cluster, task(rows), epoch=2))[0], rows)
        with pytest.raises(EncoderUnreachableError, match="worker a holds no image encoder"):
            await encoded_by(cluster, task(rows), epoch=1)
        await load(cluster, folder, None, epoch=3, again=True)
        with pytest.raises(EncoderUnreachableError, match="worker a holds no image encoder"):
            await encoded_by(cluster, task(rows), epoch=3)


async def test_a_tile_of_a_wrong_size_is_refused_and_the_next_one_computed(
    folder: Path, rows: Float32, tmp_path: Path
) -> None:
    wrong = TileTask(np.zeros((12, 16, 3), np.uint8), *rows.shape)
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        with pytest.raises(RequestError, match=r"multiples of 8 and at most 262144 pixels, but has 16 x 12"):
            await encoded_by(cluster, wrong)
        peer = peer_of(cluster, "a")
        stream = peer.open(ENCODE, epoch=1)
        await stream.write(encode_tile(wrong.tile))
        refusal = await stream.read()
        assert refusal is not None and refusal[:1] == b"\0"
        await stream.write(encode_tile(tile_of(NAME)))
        assert await stream.read() == b"\1" + rows.tobytes()
        await peer.close()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "an image tile has 0 bytes; its height and width alone take 8"),
        (encode_tile(tile_of(NAME))[:-1], "an image tile of 40 x 24 pixels has 2887 bytes; expected 2888"),
        (bytes(3 * 262144 + 9), "the socket was closed"),
    ],
)
async def test_damaged_messages_end_the_stream_alone(
    data: bytes, error: str, folder: Path, rows: Float32, tmp_path: Path
) -> None:
    async with workers(tmp_path) as cluster:
        await load(cluster, folder, beside(folder))
        peer = peer_of(cluster, "a")
        stream = peer.open(ENCODE, epoch=1)
        await stream.opened()
        with pytest.raises(StreamBrokenError) as caught:
            await stream.write(data)
            await stream.read()
        assert re.search(error, str(caught.value)) and "\n" not in str(caught.value)
        await peer.close()
        same((await encoded_by(cluster, task(rows)))[0], rows)


@pytest.mark.parametrize("damaged", [False, True])
async def test_an_encoder_is_fetched(damaged: bool, folder: Path, rows: Float32, tmp_path: Path) -> None:
    """Worker b lacks the file, or has a copy that differs where the model id takes no sample."""
    own = tmp_path / "own"
    own.mkdir()
    path, model = folder / "mmproj-m.gguf", folder / "m.gguf"
    if damaged:
        (own / path.name).write_bytes(path.read_bytes())
        flip_middle(own / path.name, "v.blk.1.ffn_up.weight")
    async with workers(tmp_path / "run", "ab", a=folder, b=own) as cluster:
        copy = OwnCopy(open_projector(path).plain) if damaged else None
        wanted = projector_at(f"/nowhere/{path.name}", path, model, copy)
        _, handle = await load(cluster, folder, wanted, "ab")
        assert handle.stages[1][1].fetched_bytes > 0
        same((await encoded_by(cluster, task(rows), name="b"))[0], rows)


async def test_a_load_without_memory_for_the_encoder_names_it(
    folder: Path, rows: Float32, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("llamaclust.worker.weights.load.encoder_bytes", lambda *_: EncoderMemory(1 << 50, 1 << 20))
        async with workers(tmp_path) as cluster:
            with pytest.raises(InsufficientMemoryError, match=r"encoder of .*mmproj-m.gguf needs .*weights 1073741824"):
                await load(cluster, folder, beside(folder))
            patched.undo()
            await load(cluster, folder, beside(folder), epoch=2)
            same((await encoded_by(cluster, task(rows), epoch=2))[0], rows)
