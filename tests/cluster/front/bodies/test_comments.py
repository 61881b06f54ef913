"""Tests of the comments in streams that show nothing for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from llamaclust.cluster.front.http.sse import StreamFormat
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Event, Framing, View
from llamaclust.cluster.front.replies.reply_cache import ReplyCache
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogContent, LogItem
from llamaclust.cluster.front.text.sharing import RowStorage
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.state.journal_records import RequestContext


class Texts(View):
    def frames(self, prompt: int, item: LogItem) -> Sequence[Event]:
        assert isinstance(item, TextChunk)
        return [Event(0, {"text": item.text})]

    def whole(self, parts: object) -> Mapping[str, Any]:
        raise AssertionError


async def test_what_arrives_while_a_client_takes_a_comment_is_sent_next() -> None:
    """The first comment is due at once, and the next one only after the deadline of this test."""
    context = RequestContext(id="a", seed=1, created=1, client="c", endpoint="/v1/completions")
    kept = KeptReply(context, ReplyCache(ApiSettings()), is_kept=False)
    framing = Framing(StreamFormat.EVENTS, "a", 600.0, with_ids=False)
    async with asyncio.timeout(60):
        parts = kept.stream(framing)
        assert (await anext(parts)).startswith(b":")

        def view(log: AnswerLog) -> View:
            return Texts()

        kept._view = view
        kept.log.begin([GenerationRequest("a", (1,), 2)], LogContent(RowStorage.STREAMED))
        kept.log.release()
        kept.log.append(0, TextChunk(0, "b"))
        kept.log.end(0)
        assert b'"text":"b"' in (await anext(parts)).replace(b" ", b"")
        await parts.aclose()
