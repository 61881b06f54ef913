"""Events of OpenAI's streams, of which only the choice is rendered each time: the same bytes as rendered in whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.api.openai.reply import OpenAiReply
from llamaclust.cluster.api.openai.schema import StreamOptions
from llamaclust.cluster.api.sse import event

CHOICES: list[dict[str, Any]] = [
    {"index": 0, "delta": {"role": "assistant", "content": None}, "logprobs": None, "finish_reason": None},
    {"index": 1, "delta": {"content": 'a "[]" \n\u2028 \ud800'}, "logprobs": None, "finish_reason": None},
    {"index": 0, "delta": {}, "logprobs": {"content": iter(())}, "finish_reason": "stop"},
]


def reply_of(model: str) -> Any:
    fakes: Any = SimpleNamespace(id="ab12", created=1, id_prefix="chatcmpl-", model=model, chunk_object="chunk")
    reply = OpenAiReply(fakes, fakes, fakes, fakes, fakes, StreamOptions())
    stream: Any = SimpleNamespace(generation=SimpleNamespace(seed=7))
    reply._prompts.streams.append(stream)
    return reply


@pytest.mark.parametrize("model", ["m", 'x"[]"', "[]"])
@pytest.mark.parametrize(
    "more", [{}, {"usage": None}, {"usage": {"prompt_tokens": 3}}, {"timings": {"a": []}}], ids=str
)
def test_events_are_those_that_are_rendered_in_whole(model: str, more: dict[str, Any]) -> None:
    reply = reply_of(model)
    for _ in range(2):
        for choice in CHOICES:
            copy = {**choice, "logprobs": None if choice["logprobs"] is None else {"content": iter(())}}
            whole = event({**reply._reply("chunk", [copy]), **more})
            assert reply._event_of(choice, more, is_large=False) == whole
            choice["logprobs"] = None if choice["logprobs"] is None else {"content": iter(())}
