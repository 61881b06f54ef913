"""Tests of images in the Python client's messages: paths, bytes and Pillow's images."""

from __future__ import annotations

import io
import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llamaclust.cluster.client import message_images
from llamaclust.cluster.client.http import AsyncClient
from llamaclust.cluster.client.message_images import image_part, message_json, with_latest_images
from llamaclust.cluster.client.session import AsyncChatSession
from llamaclust.core.errors import UsageError
from llamaclust.model.images.settings import MAX_IMAGE_BYTES
from support.chat.vision import TinyVision
from support.clusters import served as served_module
from support.clusters.served import ScriptedEngine, make_app, says, serving

PICTURE = Image.new("RGB", (3, 2), (200, 10, 30))


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)


def png(red: int = 200) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (3, 2), (red, 10, 30)).save(out, "PNG")
    return out.getvalue()


def data_of(part: dict[str, Any]) -> tuple[str, bytes]:
    head, _, data = part["image_url"]["url"].partition(",")
    return head, b64decode(data)


def test_a_path_bytes_and_an_image_of_pillow_become_data_urls(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    PICTURE.save(file, "JPEG")
    for given in (file, file.read_bytes(), bytearray(file.read_bytes())):
        assert data_of(image_part(given)) == ("data:image/jpeg;base64", file.read_bytes())
    head, data = data_of(image_part(PICTURE))
    assert head == "data:image/png;base64" and Image.open(io.BytesIO(data)).getpixel((2, 1)) == (200, 10, 30)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_images_of_pillow_may_have_any_mode(mode: str) -> None:
    steps = [PICTURE.convert(between) for between in ("RGB", "L") if mode in ("LAB", "F", "1")] or [PICTURE]
    image = Image.new(mode, (4, 4)) if mode == "LAB" else steps[-1].convert(mode)
    _, data = data_of(image_part(image))
    assert Image.open(io.BytesIO(data)).size == image.size


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_gray_images_of_pillow_keep_16_bits(mode: str) -> None:
    image = Image.new(mode, (3, 2))
    image.putpixel((2, 1), 40_000)
    _, data = data_of(image_part(image))
    sent = Image.open(io.BytesIO(data))
    assert (sent.getpixel((2, 1)), sent.getpixel((0, 0))) == (40_000, 0)


def test_contents_are_texts_images_or_lists_of_both() -> None:
    given = {"type": "image_url", "image_url": {"url": "https://a.example/b"}}
    made = message_json({"role": "user", "content": ["What is this?", png(), given], "name": "a"})
    assert made["content"] == [{"type": "text", "text": "What is this?"}, image_part(png()), given]
    assert (made["role"], made["name"]) == ("user", "a")
    assert message_json({"role": "user", "content": PICTURE})["content"] == [image_part(PICTURE)]
    for content in ("text", None):
        assert message_json({"role": "user", "content": content})["content"] == content


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Path("/no such image"), "/no such image: No such file or directory; give the path of an image"),
        (b"%PDF-1.7", "image: not an image; expected a PNG, JPEG, WebP, GIF or BMP file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * MAX_IMAGE_BYTES, "the limit is 20971520: send a smaller one"),
    ],
)
def test_other_data_are_refused_before_anything_is_sent(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        message_json({"role": "user", "content": ["a", given]})


async def test_a_session_sends_images_and_keeps_them(tmp_path: Path) -> None:
    engine, vision = ScriptedEngine(says("Red.")), TinyVision()
    async with serving(make_app(engine, vision=vision)) as url, AsyncClient(url) as client:
        session = AsyncChatSession(client)
        answer = await session.send(["What is this?", png()])
        await session.send("And now?")
    assert answer.text == "Red." and [source.data for source in vision.images] == [png()] * 2
    assert [len(request.images) for request in engine.submitted] == [1, 1]
    session.save(tmp_path / "chat.json")
    other = AsyncChatSession(client)
    other.load(tmp_path / "chat.json")
    assert other.messages == session.messages and other.messages[0]["content"][1] == image_part(png())


async def test_a_session_with_a_model_of_text_sends_no_image() -> None:
    engine = ScriptedEngine(says("Red."))
    async with serving(make_app(engine)) as url, AsyncClient(url) as client:
        session = AsyncChatSession(client)
        with pytest.raises(UsageError, match="reads text only"):
            await session.send([png(), "What is this?"])
        assert not session.messages and not engine.submitted
        await session.send("Hello")
    assert len(engine.submitted) == 1


def parts_of(messages: Any) -> list[Any]:
    return [message["content"] for message in messages]


def test_the_latest_images_that_fit_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    part, text = image_part(png()), {"type": "text", "text": "a"}
    messages: list[Any] = [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": [part, text, part]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [part]},
        {"role": "user", "content": [text, part]},
    ]
    size, images = len(json.dumps(messages)), 4 * len(json.dumps(part))
    other_bytes = 1 << 16
    assert with_latest_images(messages, other_bytes + size + 100) == (messages, 0)
    assert with_latest_images(messages, other_bytes + size - images // 4 + 20) == (
        [messages[0], message_json({**messages[1], "content": [text, part]}), *messages[2:]],
        1,
    )
    found, _ = with_latest_images(messages, other_bytes + size - images * 3 // 4 + 20)
    assert parts_of(found) == ["Be.", [text], "b", "", [text, part]]
    with pytest.raises(UsageError, match="bytes in a request; send fewer or smaller images"):
        with_latest_images(messages, other_bytes + size - images)
    monkeypatch.setattr(message_images, "MAX_IMAGES", 2)
    assert with_latest_images(messages)[1] == 2


async def test_a_session_drops_its_oldest_images_or_refuses_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_images, "MAX_IMAGES", 2)
    engine, vision = ScriptedEngine(says("Red.")), TinyVision()
    async with serving(make_app(engine, vision=vision)) as url, AsyncClient(url) as client:
        session, strict = AsyncChatSession(client, drop_oldest=True), AsyncChatSession(client)
        for number in range(3):
            await session.send(["What is this?", png(number)])
        assert session.dropped_images == 1 and len(session.messages) == 6
        assert [source.data for source in vision.images[3:]] == [png(1), png(2)]
        await strict.send([png(0), png(1)])
        with pytest.raises(UsageError, match="1 images of this conversation do not fit into a request: undo turns"):
            await strict.send([png(2)])
        assert len(strict.messages) == 2 and (await strict.send("And?")).text == "Red."
    assert len(engine.submitted) == 5


async def test_a_session_keeps_to_the_server_s_limit() -> None:
    engine, images = ScriptedEngine(says("Red.")), [png(number) for number in range(3)]
    one = len(json.dumps(image_part(images[0])))
    app = make_app(engine, vision=TinyVision(), max_body_bytes=(1 << 16) + 220 + 5 * one // 2)
    async with serving(app) as url, AsyncClient(url) as client:
        session = AsyncChatSession(client, drop_oldest=True)
        for image in images:
            await session.send([image])
        assert session.dropped_images == 1
        assert (await session.regenerate()).text == "Red." and session.dropped_images == 1
    assert [len(request.images) for request in engine.submitted] == [1, 2, 2, 2]
