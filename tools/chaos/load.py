"""Streamed requests without end, each answer compared with the undisturbed one."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

from llamaclust.cluster.client.http import AsyncChunkStream, AsyncClient
from llamaclust.core.errors import LlamaclustError, RequestError
from llamaclust.tools.chaos.tally import Answer, Tally, answer_rows

_WORDS = ("one", "river", "stone", "seven", "light", "paper", "green", "north", "salt", "clock")
_LENGTHS = (3, 30, 120)
_TOKENS = 96
_TEMPLATE_TOKENS = 32
_RETRY_S = 60.0
_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Requests:
    """Greedy and seeded, short and long prompts, chats and completions: one a number."""

    tokens: int = _TOKENS
    longest: int = max(_LENGTHS)  # prompt, in words
    with_chats: bool = True

    def start(self, client: AsyncClient, number: int) -> AsyncChunkStream:
        source = Random(number)
        text = " ".join(source.choices(_WORDS, k=min(source.choice(_LENGTHS), self.longest)))
        options: dict[str, Any] = {"max_tokens": self.tokens, "ignore_eos": True}
        if number % 2:
            options |= {"temperature": 0.8, "top_p": 0.95, "seed": number, "repetition_penalty": 1.05}
        if number % 3 == 0 and self.with_chats:
            return client.chat([{"role": "user", "content": text}], stream=True, **options)
        return client.generate(text, stream=True, **options)


async def fitting_requests(client: AsyncClient, context_tokens: int) -> Requests:
    """Requests that the context holds; chats where the model has a template for them."""
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
    """`count` requests that run again and again."""

    client: AsyncClient
    requests: Requests
    tally: Tally
    expected: dict[int, Answer] = field(default_factory=dict)
    last_token_s: float = 0.0
    received: int = 0  # tokens

    async def undisturbed(self, count: int) -> None:
        """Takes the answers that later ones are compared with."""
        answers = await asyncio.gather(*(self._answer(number) for number in range(count)))
        self.expected = dict(enumerate(answers))

    async def repeat(self, number: int, until: asyncio.Event) -> None:
        """An answer that was begun is compared, also one that an error ends. Requests that were not accepted are sent
        again for a minute."""
        refused_s: float | None = None
        while not until.is_set():
            rows: Answer = []
            try:
                await self._read(number, rows)
            except NotAcceptedError as error:
                now_s = time.monotonic()
                refused_s = refused_s or now_s
                if now_s - refused_s < _RETRY_S:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(until.wait(), _PAUSE_S)
                    continue
                self.tally.errors[str(error)] += 1
            except LlamaclustError as error:
                self.tally.errors[str(error)] += 1
            refused_s = None
            self.tally.compared.add(self.expected[number], rows)

    async def _answer(self, number: int) -> Answer:
        rows: Answer = []
        await self._read(number, rows)
        return rows

    async def _read(self, number: int, rows: Answer) -> None:
        """Appends an answer's rows as they come. NotAcceptedError before the first event."""
        is_accepted = False
        try:
            async with self.requests.start(self.client, number) as stream:
                async for chunk in stream:
                    is_accepted = True
                    rows += answer_rows(chunk.rows)
                    self.received += len(chunk.rows)
                    if chunk.rows:
                        self.last_token_s = time.monotonic()
                        self.tally.pauses.token(self.last_token_s)
        except LlamaclustError as error:
            if is_accepted:
                raise
            raise NotAcceptedError(str(error)) from error


class NotAcceptedError(LlamaclustError):
    """The request was refused, or nothing answered."""
