"""Answers of a cluster as a client of its HTTP API receives them, with the time of each event."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any
from urllib.parse import urlsplit

from llamaclust.core.errors import LlamaclustError

_ANSWER_S = 1800.0


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """`arrivals`: time and tokens of each event that had some."""

    begun_ns: int
    arrivals: tuple[tuple[int, int], ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the chosen tokens, if they were requested

    @property
    def first_ms(self) -> float:
        """Milliseconds from the request to its first token."""
        return (self.arrivals[0][0] - self.begun_ns) / 1e6

    @property
    def token_ms(self) -> float:
        """Mean of the tokens behind the first event."""
        (first_ns, first_tokens), (last_ns, _) = self.arrivals[0], self.arrivals[-1]
        return (last_ns - first_ns) / (len(self.ids) - first_tokens) / 1e6


def streamed(api: str, prompt: Sequence[int], tokens: int, **more: Any) -> StreamedAnswer:
    """A greedy answer of so many tokens. LlamaclustError where it has others."""
    body = {"prompt": [*prompt], "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more}
    text = json.dumps({**body, "stream": True, "return_token_ids": True})
    connection = http.client.HTTPConnection(str(urlsplit(api).netloc), timeout=_ANSWER_S)
    try:
        connection.connect()
        begun_ns, lines = perf_counter_ns(), list[tuple[int, bytes]]()
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != http.HTTPStatus.OK:
            raise LlamaclustError(f"{api}: {reply.status} {reply.read().decode(errors='replace')}")
        while line := reply.readline():  # what they say is read later: it would delay the next one
            lines.append((perf_counter_ns(), line))
    finally:
        connection.close()
    answer = _read(begun_ns, lines)
    if len(answer.ids) != tokens:
        raise LlamaclustError(f"{api}: an answer of {len(answer.ids)} tokens, {tokens} were requested")
    return answer


def streamed_together(api: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[StreamedAnswer]:
    with ThreadPoolExecutor(len(prompts)) as threads:
        return [*threads.map(lambda prompt: streamed(api, prompt, tokens), prompts)]


def _read(begun_ns: int, lines: Sequence[tuple[int, bytes]]) -> StreamedAnswer:
    arrivals, ids, logprobs = list[tuple[int, int]](), list[int](), list[float]()
    for at_ns, line in lines:
        event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
        if "error" in event:
            raise LlamaclustError(f"an answer ended: {event['error']}")
        for choice in event.get("choices", ()):
            if found := choice.get("token_ids"):
                arrivals.append((at_ns, len(found)))
                ids += found
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs", ())
    return StreamedAnswer(begun_ns, tuple(arrivals), tuple(ids), tuple(logprobs))
