"""Tests of received events of streamed requests: tokens and positions."""

from __future__ import annotations

import struct
from typing import Any

from llamaclust.tools.chaos.received import Received, event_number


def completion(index: int, *tokens: int) -> dict[str, Any]:
    scores = {"token_logprobs": [-0.5] * len(tokens), "top_logprobs": [{"x": -0.5}] * len(tokens)}
    return {"choices": [{"index": index, "token_ids": tokens, "logprobs": scores if tokens else None}]}


def test_ids_count_events() -> None:
    assert [event_number(text) for text in ("5f:1", "5f:3-5", "5f:3-5-0", "cmpl-5f:12")] == [1, 8, 8, 12]


def test_tokens_of_each_choice() -> None:
    received = Received()
    events = [("r:1", completion(0)), ("r:2", completion(0, 7)), ("r:2-1", completion(1, 8, 9))]
    assert [received.add(*event) for event in events] == [0, 1, 2]
    assert [token for token, _ in received.choices[1]] == [8, 9] and received.misplaced == 0
    assert received.choices[0][0][1].startswith(struct.pack("<f", -0.5))


def test_chats_have_other_logprobs() -> None:
    received, other = Received(), Received()
    for top, answer in ((-1.5, received), (-1.25, other)):
        entry = {"logprob": -0.5, "top_logprobs": [{"id": 4, "logprob": top}]}
        answer.add("r:1", {"choices": [{"index": 0, "token_ids": [4], "logprobs": {"content": [entry]}}]})
    assert received.choices[0][0][0] == 4 and received.choices != other.choices


def test_duplicated_and_skipped_events_are_counted() -> None:
    received = Received()
    for number in (1, 2, 2, 3, 5):
        received.add(f"r:{number}", completion(0, number))
    assert received.misplaced == 2
