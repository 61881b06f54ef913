"""Checks that a restarted coordinator has the images of journalled requests or reports that they were too large."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.images import chat_images
from llamaclust.cluster.front.images.chat_images import check_restored, journalled, with_images
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply_cache import ReplyCache
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.images import image_part
from llamaclust.cluster.front.text.request import ChatRequest
from llamaclust.cluster.state.journal_records import RequestContext, read_journal
from llamaclust.core.errors import RequestFailedError
from support.chat.vision import data_url, image
from support.clusters.journals import NOW, admission, journal

URL = "https://example.com/a.png"
IMAGE = image(2, bytes(range(200, 256)))
CHAT = ChatRequest(({"role": "user", "content": [image_part(URL), image_part(data_url(IMAGE))]},))


@pytest.fixture(autouse=True)
def _web(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(urls: list[str], most_bytes: int) -> dict[str, bytes]:
        return dict.fromkeys(urls, IMAGE)

    monkeypatch.setattr("llamaclust.cluster.front.images.fetching.fetch_images", fetch)


async def recorded(path: Path, context: RequestContext, body: bytes) -> RequestContext:
    """Journals a request and returns it like the next coordinator reads it."""
    async with journal(path) as opened:
        await opened.admit(journalled(context, body))
        opened.seal()
    (request,) = read_journal(path, NOW)
    return request


async def test_fetched_images_are_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = admission(1)
    chat = await with_images(CHAT, context)
    assert chat.images == {URL: IMAGE} and context.image_bytes == 2 * len(IMAGE)
    restored = await recorded(tmp_path / "journal", context, b'{"a": 1}')
    assert restored.body == b'{"a": 1}' and restored.images == {URL: IMAGE}
    check_restored(restored)
    monkeypatch.setattr("llamaclust.cluster.front.images.fetching.fetch_images", None)  # nothing is fetched again
    assert (await with_images(CHAT, restored)).images == {URL: IMAGE}


async def test_fetched_images_count_as_bytes_of_kept_replies() -> None:
    cache = ReplyCache(ApiSettings(max_kept_bytes=len(IMAGE)))
    cache.add(KeptReply(admission(1), cache), b"1")
    with pytest.raises(HttpError, match="kept replies"):
        cache.add(KeptReply(replace(admission(2), images={URL: IMAGE}), cache), b"1")
    cache.stop()


async def test_images_above_the_bound_are_an_error_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_images, "MAX_JOURNALLED_BYTES", 2 * len(IMAGE) - 1)
    context = replace(admission(1), earlier=({"role": "user", "content": "a"},))
    await with_images(CHAT, context)
    restored = await recorded(tmp_path / "journal", context, b"body")
    assert (restored.body, restored.earlier, restored.images) == (b"", (), {})
    with pytest.raises(RequestFailedError, match=f"{2 * len(IMAGE)} bytes, and the journal keeps"):
        check_restored(restored)
    assert not restored.idempotency_key and context.earlier
