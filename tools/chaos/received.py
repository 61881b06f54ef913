"""The answers to one streamed request, as a client received them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llamaclust.core.sampler.results import RowResult

Answer = list[tuple[int, bytes]]
"""Tokens of an answer. The bytes of a token are its logprob as float32, followed by its top logprobs as JSON."""


def answer_rows(rows: Iterable[RowResult]) -> Answer:
    return [(row.token, _bits(row.logprob, list(row.top_logprobs))) for row in rows]


@dataclass(slots=True)
class Received:
    choices: dict[int, Answer] = field(default_factory=dict)
    misplaced: int = 0  # Number of events that were duplicated or skipped.
    _events: int = 0

    def add(self, event_id: str, event: Mapping[str, Any]) -> int:
        number = event_number(event_id)
        self.misplaced += abs(number - self._events - 1)
        self._events = number
        rows = 0
        for choice in event["choices"]:
            answer = _choice_rows(choice)
            self.choices.setdefault(choice["index"], []).extend(answer)
            rows += len(answer)
        return rows


def event_number(event_id: str) -> int:
    """Returns the number of events up to the event with this id. For example, the id `REQUEST:3-5` stands for 8 events,
    3 of the first choice and 5 of the second."""
    return sum(map(int, event_id.rpartition(":")[2].split("-")))


def _choice_rows(choice: Mapping[str, Any]) -> Answer:
    logprobs = choice["logprobs"] or {}
    if "content" in logprobs:
        scores = [(entry["logprob"], entry["top_logprobs"]) for entry in logprobs["content"]]
    else:
        top = logprobs.get("top_logprobs", ())
        scores = list(zip(logprobs.get("token_logprobs", ()), top, strict=True))
    ids = choice.get("token_ids", ())
    return [(token, _bits(*score)) for token, score in zip(ids, scores, strict=True)]


def _bits(logprob: float, top: Any) -> bytes:
    return struct.pack("<f", logprob) + (json.dumps(top).encode() if top else b"")
