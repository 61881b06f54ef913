"""Tests of the HTTP client's reading of events of a streamed answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from llamaclust.cluster.client.http import ResumableStream
from llamaclust.cluster.client.http_codec import ChunkReader
from llamaclust.core.errors import LlamaclustError, ProtocolError

URL = httpx.URL("http://127.0.0.1:1")


def test_events_may_be_cut_anywhere() -> None:
    events: list[dict[str, Any]] = [{"n": 1}, {"text": "\u00e9\u2028"}, {"n": 3}]
    data = b": waiting\n\n" + b"".join(
        b"data: " + json.dumps(event, ensure_ascii=False).encode() + end
        for event, end in zip(events, (b"\n\n", b"\r\n\r\n", b"\n\n"), strict=True)
    )
    data += b"data: [DONE]\n\ndata: {}\n\n"
    for size in (1, 2, 3, 7, len(data)):
        reader = ResumableStream(URL)
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [event for piece in pieces for event in reader.feed(piece)] == events
        assert reader.is_done


def test_a_long_event_in_small_pieces_is_read_in_linear_time() -> None:
    data = b'data: {"text": "' + b"x" * (1 << 20) + b'"}\n'
    reader = ResumableStream(URL)
    events = [event for start in range(0, len(data), 64) for event in reader.feed(data[start : start + 64])]
    assert len(events[0]["text"]) == 1 << 20


def test_an_error_event_is_raised() -> None:
    data = b'data: {"error": {"message": "no", "code": "deadline_exceeded", "type": "server_error"}}\n\n'
    with pytest.raises(LlamaclustError, match="no") as caught:
        list(ResumableStream(URL).feed(data))
    assert (type(caught.value).__name__, caught.value.code) == ("DeadlineError", "deadline_exceeded")
    with pytest.raises(ProtocolError):
        list(ResumableStream(URL).feed(b"data: {\n"))


def test_scored_rows_that_come_in_several_events() -> None:
    rows, reader = [[0.5, 1.5], [2.5], [3.5, 4.5]], ChunkReader()
    seen: list[float] = []
    opening = {"text": "", "prompt_token_ids": [9, 8, 7, 6, 5, 4], "logprobs": {"token_logprobs": [None]}}
    reader.read({"seed": 1, "choices": [opening]})
    for logprobs in rows:
        choice: dict[str, object] = {
            "text": "",
            "token_ids": [],
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": None,
        }
        seen += reader.read({"choices": [choice]}).prompt_logprobs
    assert seen == [0.5, 1.5, 2.5, 3.5, 4.5]
