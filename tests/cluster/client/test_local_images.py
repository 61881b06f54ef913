"""Checks that images change the answers of a model in this process, and that its encoder's memory is checked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from PIL import Image

from llamaclust import Client
from llamaclust.cluster.client.http_codec import AnswerOptions
from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.config.values import OFF
from llamaclust.cluster.engine.pipeline import TileTask
from llamaclust.cluster.launchers.in_process import LocalSettings, LocalStage
from llamaclust.cluster.launchers.models import local_encoder
from llamaclust.core.errors import InsufficientMemoryError, ModelFileError, ParameterError
from llamaclust.worker.devices.encoder_limits import EncoderMemory
from llamaclust.worker.encoder.tile_encoder import TileEncoder
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector, tile_of

SEEDED: AnswerOptions = {"max_tokens": 12, "temperature": 0.9, "seed": 3, "ignore_eos": True}
RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ((250, 10, 10), (10, 20, 240)))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a model with a projector beside it."""
    path = tmp_path_factory.mktemp("seeing") / "m.gguf"
    build_tiny_model(path, layers=2, hidden=TEXT_WIDTH, heads=4, ffn=96)
    build_projector(path.with_name("mmproj-m.gguf"), "gemma3")
    return path


@pytest.fixture(scope="module")
def client(seeing: Path) -> Iterator[LocalClient]:
    settings = LocalSettings(context_length=640, mmproj=None, prefix_cache=False)
    with Client.local(seeing, threads=1, settings=settings) as client:
        yield client


def answer(client: LocalClient, *images: Image.Image) -> tuple[tuple[int, ...], tuple[float, ...], int]:
    reply = client.chat([{"role": "user", "content": ["What is this?", *images]}], **SEEDED)
    return reply.token_ids, reply.logprobs, len(reply.prompt_token_ids)


def test_answers_depend_on_images(client: LocalClient) -> None:
    first, second, text = answer(client, RED), answer(client, BLUE), answer(client)
    assert answer(client, RED) == first, "the same bits"
    assert first[1] != second[1] and first[2] == second[2] > text[2]


def test_without_its_projector_a_model_reads_text_only(client: LocalClient, seeing: Path) -> None:
    with Client.local(seeing, threads=1, settings=LocalSettings(context_length=640)) as plain:
        assert answer(plain) == answer(client)
        with pytest.raises(ParameterError, match="image input is not supported"):
            answer(plain, RED)
    with pytest.raises(ModelFileError, match=r"a projector has 'clip'"):
        Client.local(seeing, threads=1, settings=LocalSettings(mmproj=str(seeing)))


def test_memory_of_the_encoder_is_checked(seeing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_encoder, "encoder_bytes", lambda *_: EncoderMemory(1 << 50, 1 << 20))
    says, chosen = r"image encoder needs .* are missing; set mmproj to off", str(seeing.with_name("mmproj-m.gguf"))
    with pytest.raises(InsufficientMemoryError, match=says):
        Client.local(seeing, threads=1, settings=LocalSettings(mmproj=chosen))
    with Client.local(seeing, threads=1, settings=LocalSettings(mmproj=None)) as plain:
        assert plain.unused_projectors is not None and re.search(
            f"images are not read: .*{says}", plain.unused_projectors
        )
        with pytest.raises(ParameterError, match="image input is not supported"):
            answer(plain, RED)
    with Client.local(seeing, threads=1, settings=LocalSettings(mmproj=OFF)) as plain:
        assert plain.unused_projectors is None


async def test_an_ending_client_waits_for_a_tile_beside_the_event_loop(
    seeing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = Event(), Event()

    def hold(encoder: TileEncoder, tile: object) -> None:
        begun.set()
        gate.wait(3.0)

    monkeypatch.setattr(TileEncoder, "rows", hold)
    stage = LocalStage(seeing, 1, None, LocalSettings(context_length=640, mmproj=None))
    async with stage.serve():
        assert stage.encoder is not None
        encoding = asyncio.create_task(stage.encoder.rows(TileTask(tile_of("gemma3"), 1, 1)))
        assert await asyncio.to_thread(begun.wait, 20.0)
        encoding.cancel()
        asyncio.get_running_loop().call_later(0.01, gate.set)
    assert gate.is_set(), "the event loop was blocked"
