"""Reads streamed answers over HTTP with little processor time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from llamaclust.core.errors import LlamaclustError

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def requested(
    api: str, body: dict[str, Any], path: str = "/v1/completions", connection: Connection | None = None
) -> Connection:
    where, content = urlsplit(api), json.dumps({**body, "stream": True}).encode()
    if connection is None:
        connection = await asyncio.open_connection(where.hostname, where.port, limit=1 << 22)
    reader, writer = connection
    fields = f"Host: {where.netloc}", "Content-Type: application/json", f"Content-Length: {len(content)}", "", ""
    writer.write("\r\n".join((f"POST {path} HTTP/1.1", *fields)).encode() + content)
    await writer.drain()
    return reader, writer


async def event(reader: asyncio.StreamReader) -> bytes:
    """Returns the next event's data, or no data at the end. Raises LlamaclustError for an error or a lost
    connection."""
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return b""
        if line.startswith(b"data: {"):
            if b'"error"' in line[:20]:
                raise LlamaclustError(f"an answer ended with an error: {line[6:300].decode(errors='replace').strip()}")
            return line[6:]
        if line.startswith(b"HTTP/1.1 ") and not line.startswith(b"HTTP/1.1 200"):
            head, _, rest = (await reader.read(2000)).partition(b"\r\n\r\n")
            rest = rest or await reader.read(2000)  # The body may come later.
            raise LlamaclustError(f"the request was refused: {line.decode().strip()} {(rest or head)[-300:]!r}")
    raise LlamaclustError("the connection was closed before the answer was complete")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `arrivals` has the time and the number of tokens of each event with tokens."""

    begun_s: float
    arrivals: tuple[tuple[float, int], ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # Logprobs of the chosen tokens, if requested.

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0] - self.begun_s

    @property
    def token_s(self) -> float:
        """Mean seconds per token after the first event."""
        (first_s, first), (last_s, _) = self.arrivals[0], self.arrivals[-1]
        return (last_s - first_s) / (len(self.ids) - first) if len(self.ids) > first else 0.0

    @property
    def bits(self) -> bytes:
        return repr((self.ids, self.logprobs)).encode()


async def answer(api: str, prompt: Sequence[int], tokens: int, **more: Any) -> Answer:
    """Requests a greedy answer of `tokens` tokens. Raises LlamaclustError if the answer has another length."""
    body = {"prompt": [*prompt], "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more}
    begun_s, lines = perf_counter(), list[tuple[float, bytes]]()
    reader, writer = await requested(api, {**body, "return_token_ids": True})
    while data := await event(reader):  # Events are parsed later, because parsing would delay the next event.
        lines.append((perf_counter(), data))
    writer.close()
    found = read_answer(begun_s, lines)
    if len(found.ids) != tokens:
        raise LlamaclustError(f"{api}: an answer has {len(found.ids)} tokens, but {tokens} were requested")
    return found


def read_answer(begun_s: float, lines: Sequence[tuple[float, bytes]]) -> Answer:
    arrivals, ids, logprobs = list[tuple[float, int]](), list[int](), list[float]()
    for at_s, data in lines:
        for choice in json.loads(data).get("choices", ()):
            if found := choice.get("token_ids"):
                arrivals.append((at_s, len(found)))
                ids += found
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs", ())
    return Answer(begun_s, tuple(arrivals), tuple(ids), tuple(logprobs))
