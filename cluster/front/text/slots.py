"""Slots of llama.cpp's API. A slot records the tokens of its last request, but it has no KV memory of its own."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales

if TYPE_CHECKING:
    from llamaclust.cluster.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class SlotTokens:
    """The tokens of a slot. Sequences with the same beginning, salt and adapters share the tokens' KV memory."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    cache_salt: str = ""
    adapters: AdapterScales = ()


class Slots:
    def __init__(self, engine: Engine, count: int) -> None:
        self.count = count
        self._engine = engine
        self._tokens: dict[int, SlotTokens] = {}

    @property
    def model_id(self) -> str:
        return self._engine.scheduler.settings.model_id

    def check(self, slot: int | None, *, has_images: bool) -> None:
        """Raises ParameterError for an unknown slot or a prompt with images, unless slots are off (`count` is 0)."""
        if slot is not None and self.count and not 0 <= slot < self.count:
            raise ParameterError(
                "id_slot", f"slot {slot} does not exist: there are {self.count} slots, numbered from 0"
            )
        if slot is not None and self.count and has_images:
            raise ParameterError("id_slot", "slots keep only token ids and no images; remove id_slot")

    @contextmanager
    def recording(self, slot: int | None, request: GenerationRequest, log: AnswerLog, prompt: int) -> Iterator[None]:
        """Records the tokens of the prompt and of the first answer, but only those before the first image. The `with`
        block must submit the request. If the block raises an error, the slot stays unchanged."""
        if slot is None or not self.count:
            yield
            return
        tokens = array("I")
        last: int | None = None

        def take(of: int, chunk: TextChunk) -> None:
            nonlocal last
            if of == prompt and chunk.index == 0 and not request.images:
                for row in chunk.rows:
                    if last is not None:  # The last token has no keys and values until the next token is computed.
                        tokens.append(last)
                    last = row.token

        log.subscribe(take)  # Tokens that an earlier coordinator recorded come during the submission.
        yield
        # The engine has accepted the token ids.
        tokens[:0] = array("I", request.prompt[: request.images[0].start] if request.images else request.prompt)
        self._tokens[slot] = SlotTokens(tokens, request.cache_salt, request.adapters)

    def tokens(self, slot: int) -> SlotTokens:
        """Returns the slot's tokens whose keys and values are computed."""
        kept = self._tokens.get(slot, SlotTokens())
        return replace(kept, tokens=kept.tokens[:])  # A running request may append to the array.

    def put(self, slot: int, tokens: SlotTokens) -> None:
        self._tokens[slot] = tokens

    def erase(self, slot: int) -> int:
        """Removes the tokens of a slot and returns their number. KV memory stays, as other requests may share it."""
        return len(self._tokens.pop(slot, SlotTokens()).tokens)
