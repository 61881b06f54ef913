"""Repeats streamed requests under faults, and compares each answer with the answer without faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.core.errors import LlamaclustError, RequestError
from llamaclust.tools.chaos.received import Received
from llamaclust.tools.chaos.tally import Tally

_WORDS = ("one", "river", "stone", "seven", "light", "paper", "green", "north", "salt", "clock")
_LENGTHS = (3, 30, 120)
_TOKENS = 96
_TEMPLATE_TOKENS = 32
_RETRY_S = 120.0
_PAUSE_S = 0.2
_MIXED: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (2, 1, {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.05}),
    (4, 3, {"n": 2}),
    (5, 4, {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repeat_last_n": 64}),
    (11, 7, {"mirostat": 2}),
    (13, 8, {"dry_multiplier": 0.8}),
)
"""Entries (divisor, remainder, fields). A request gets the fields if its number modulo the divisor is the remainder."""
_TOP_EVERY, _TOP = 7, 5


@dataclass(frozen=True, slots=True)
class Requests:
    """Generates requests. A request's number determines its prompt, sampling, choices, logprobs and endpoint."""

    tokens: int = _TOKENS
    longest: int = max(_LENGTHS)  # Number of words in the longest prompt.
    with_chats: bool = True

    def path_and_body(self, number: int) -> tuple[str, dict[str, Any]]:
        source = Random(number)
        text = " ".join(source.choices(_WORDS, k=min(source.choice(_LENGTHS), self.longest)))
        body: dict[str, Any] = {"max_tokens": self.tokens, "ignore_eos": True, "temperature": 0.0, "seed": number}
        for divisor, remainder, fields in _MIXED:
            body |= fields if number % divisor == remainder else {}
        top = _TOP if number % _TOP_EVERY == _TOP_EVERY - 1 else 0
        if number % 3 == 0 and self.with_chats:
            messages = [{"role": "user", "content": text}]
            return "v1/chat/completions", {**body, "messages": messages, "logprobs": True, "top_logprobs": top}
        return "v1/completions", {**body, "prompt": text, "logprobs": top}

    def start(self, client: AsyncClient, number: int) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        return client.events(*self.path_and_body(number))


async def fitting_requests(client: AsyncClient, context_tokens: int) -> Requests:
    tokens = max(1, min(_TOKENS, context_tokens // 3))
    word_tokens = max([len(await client.tokenize(f" {word}", add_special=False)) for word in _WORDS])
    longest = max(1, (context_tokens - tokens - _TEMPLATE_TOKENS) // word_tokens)
    try:
        await client.chat([{"role": "user", "content": _WORDS[0]}], max_tokens=1)
    except RequestError:
        return Requests(tokens, longest, with_chats=False)
    return Requests(tokens, longest)


@dataclass
class Streams:
    client: AsyncClient
    requests: Requests
    tally: Tally
    expected: dict[int, Received] = field(default_factory=dict)
    last_token_s: float = 0.0
    received: int = 0  # Number of tokens received so far.

    async def undisturbed(self, count: int) -> None:
        answers = await asyncio.gather(*(self._answer(number) for number in range(count)))
        self.expected = dict(enumerate(answers))

    async def repeat(self, number: int, until: asyncio.Event) -> None:
        """Repeats a request until `until` is set, and compares each answer with the answer without faults. A refused
        request is retried for up to two minutes, even if `until` is set."""
        refused_s: float | None = None
        while refused_s is not None or not until.is_set():
            received = Received()
            try:
                await self._read(number, received)
            except NotAcceptedError as error:
                now_s = time.monotonic()
                refused_s = refused_s or now_s
                if now_s - refused_s < _RETRY_S:
                    await asyncio.sleep(_PAUSE_S)
                    continue
                self.tally.errors[str(error)] += 1
            except LlamaclustError as error:
                self.tally.errors[str(error)] += 1
            refused_s = None
            self.tally.compared.add_request(self.expected[number], received)

    async def _answer(self, number: int) -> Received:
        received = Received()
        await self._read(number, received)
        return received

    async def _read(self, number: int, received: Received) -> None:
        is_accepted = False
        try:
            async with aclosing(self.requests.start(self.client, number)) as events:
                async for event_id, event in events:
                    is_accepted = True
                    if rows := received.add(event_id, event):
                        self.received += rows
                        self.last_token_s = time.monotonic()
                        self.tally.pauses.token(self.last_token_s)
        except LlamaclustError as error:
            if is_accepted:
                raise
            raise NotAcceptedError(str(error)) from error


class NotAcceptedError(LlamaclustError):
    """The server refused the request, or no server answered."""


@asynccontextmanager
async def meanwhile(works: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Runs tasks during the caller's block, then cancels them. Raises the first error of a task."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
