"""Events of OpenAI's streams, of which only the choice is rendered each time: the same bytes as rendered in whole."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.cluster.front.dialects.openai.schema import StreamOptions
from llamaclust.cluster.front.dialects.openai.view import OpenAiHead, OpenAiView, ReplyKind
from llamaclust.cluster.front.http.sse import event
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogContent
from llamaclust.cluster.front.text.budget import RowStorage
from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.served import tokenizer

CHOICES: list[dict[str, Any]] = [
    {"index": 0, "delta": {"role": "assistant", "content": None}, "logprobs": None, "finish_reason": None},
    {"index": 1, "delta": {"content": 'a "[]" \n\u2028 \ud800'}, "logprobs": None, "finish_reason": None},
    {"index": 0, "delta": {}, "logprobs": {"content": iter(())}, "finish_reason": "stop"},
]


class PlainView(OpenAiView):
    """Only what stands around choices."""

    def _opening(self, prompt: int, index: int) -> None:
        return None

    def _chunk(self, prompt: int, chunk: TextChunk) -> None:
        return None

    def _text(self, chunk: TextChunk) -> None:
        return None

    def _answer(self, prompt: int, answer: TextChunk) -> dict[str, Any]:
        return {}


def view_of(model: str) -> PlainView:
    log = AnswerLog()
    log.begin([GenerationRequest("a", (1,), 1, seed=7)], LogContent(RowStorage.STREAMED))
    head = OpenAiHead(
        kind=ReplyKind("chatcmpl-", "whole", "chunk"),
        reply_id="ab12",
        created=1,
        model=model,
        choices=1,
        streaming=StreamOptions(),
        shows_timings=False,
        shows_progress=False,
        shows_prompt=False,
    )
    return PlainView(head, tokenizer(), log)


@pytest.mark.parametrize("model", ["m", 'x"[]"', "[]"])
@pytest.mark.parametrize(
    "more", [{}, {"usage": None}, {"usage": {"prompt_tokens": 3}}, {"timings": {"a": []}}], ids=str
)
async def test_events_are_those_that_are_rendered_in_whole(model: str, more: dict[str, Any]) -> None:
    view = view_of(model)
    for _ in range(2):
        for choice in CHOICES:
            copy = {**choice, "logprobs": None if choice["logprobs"] is None else {"content": iter(())}}
            whole = event({**view._reply("chunk", [copy]), **more})
            assert view._event_of(choice, more, is_large=False) == whole
            choice["logprobs"] = None if choice["logprobs"] is None else {"content": iter(())}
