"""Slots, as llama.cpp's clients number them: each remembers the tokens of the last request that named it. KV memory
belongs to no slot: requests share it by their tokens."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import Subscriber
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales

if TYPE_CHECKING:
    from llamaclust.cluster.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class SlotTokens:
    """Tokens from position 0 on, and which requests share their KV memory."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    cache_salt: str = ""
    adapters: AdapterScales = ()


class Slots:
    """The slots of one served model."""

    def __init__(self, engine: Engine, count: int) -> None:
        """`count`: 0 where none remembers anything."""
        self.count = count
        self._engine = engine
        self._tokens: dict[int, SlotTokens] = {}

    @property
    def model_id(self) -> str:
        return self._engine.scheduler.settings.model_id

    def check(self, slot: int | None) -> None:
        """ParameterError for the number of none, where slots are kept."""
        if slot is not None and self.count and not 0 <= slot < self.count:
            raise ParameterError("id_slot", f"{slot}, but there are {self.count} slots, numbered from 0")

    def recording(self, slot: int, request: GenerationRequest, prompt: int) -> Subscriber:
        """The slot has the request's prompt now, and gets the tokens of its first answer, which the result takes from
        the chunks of a log's prompt `prompt`."""
        tokens = array("I", request.prompt)
        self._tokens[slot] = SlotTokens(tokens, request.cache_salt, request.adapters)
        last: int | None = None

        def take(of: int, chunk: TextChunk) -> None:
            nonlocal last
            if of == prompt and chunk.index == 0:
                for row in chunk.rows:
                    if last is not None:  # it has no keys and values before its successor is computed
                        tokens.append(last)
                    last = row.token

        return take

    def tokens(self, slot: int) -> SlotTokens:
        """The tokens of a slot whose keys and values are computed, or are to be."""
        kept = self._tokens.get(slot, SlotTokens())
        return replace(kept, tokens=kept.tokens[:])  # a request may go on

    def put(self, slot: int, tokens: SlotTokens) -> None:
        self._tokens[slot] = tokens

    def erase(self, slot: int) -> int:
        """Forgets a slot's tokens; how many these were. Their KV memory stays: other requests may share it."""
        return len(self._tokens.pop(slot, SlotTokens()).tokens)
