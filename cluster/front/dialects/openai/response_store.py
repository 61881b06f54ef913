"""Stores responses in memory, so that later requests can retrieve or continue them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakValueDictionary

from llamaclust.cluster.front.dialects.openai.response_items import REFERENCE, Item, messages_of, with_ids
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.json_text import has_many_values, json_size, off_loop_if, size_of_json
from llamaclust.core.errors import ParameterError

MAX_RESPONSES: Final = 1024
MAX_BYTES: Final = 64 << 20

Messages = tuple[Mapping[str, Any], ...]


@dataclass(slots=True, eq=False)
class StoredResponse:
    """A response with its input items and its chat."""

    response: dict[str, Any]  # The response's JSON.
    input_items: list[Item]
    messages: Messages  # The chat with the answer but without instructions. Empty before the answer has ended.
    held_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.held_bytes = json_size([self.response, self.input_items, self.messages])


async def stored_response(response: dict[str, Any], input_items: Sequence[Item], messages: Messages) -> StoredResponse:
    """Makes a stored response, and gives ids to its input items."""

    def make() -> StoredResponse:
        return StoredResponse(response, with_ids(input_items, response["id"]), messages)

    return await off_loop_if(has_many_values([response, input_items, messages]), make)


class ResponseStore:
    """Stores responses by owner and id, and limits their number and memory. Not thread-safe."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: dict[tuple[str, str], StoredResponse] = {}  # Keys are (owner, id), the oldest first.
        # Responses that are being computed. Keys are (owner, id).
        self._computed = WeakValueDictionary[tuple[str, str], Storing]()

    def storing(self, owner: str, response_id: str, input_items: Sequence[Item], messages: Messages) -> Storing:
        """Returns an object that will store the complete response. `messages` are the chat before the answer."""
        storing = self._computed[owner, response_id] = Storing(self, owner, input_items, messages)
        return storing

    def put(self, owner: str, stored: StoredResponse) -> None:
        """Stores a response unless it is too large. Deletes other responses to make room."""
        self._stored.pop((owner, stored.response["id"]), None)
        if stored.held_bytes <= self._max_bytes:
            self._make_room(stored.held_bytes)
            self._stored[owner, stored.response["id"]] = stored

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        return self._stored.get((owner, response_id))

    def replace(self, owner: str, stored: StoredResponse) -> None:
        """Stores a cancelled response. If the response still completes, the complete version is not stored."""
        self.delete(owner, stored.response["id"])
        self.put(owner, stored)

    def delete(self, owner: str, response_id: str) -> bool:
        """Deletes a response, and prevents later versions from being stored. Returns False if none was stored."""
        key = owner, response_id
        if (storing := self._computed.pop(key, None)) is not None:
            storing.is_done = True
        return self._stored.pop(key, None) is not None

    def followed(self, owner: str, response_id: str) -> StoredResponse:
        """Returns the response that a request continues. Raises HttpError if it is missing or did not end normally."""
        stored = self.get(owner, response_id)
        if stored is None or stored.response["status"] not in ("completed", "incomplete"):
            why = "is not stored on this server" if stored is None else f"is {stored.response['status']}"
            message = f"previous_response_id: response {response_id[:60]!r} {why}"
            raise HttpError(400, "previous_response_not_found", message, param="previous_response_id")
        return stored

    async def resolved(self, owner: str, items: list[Item], most_bytes: int) -> list[Item]:
        """Replaces references with items. Raises HttpError for unknown items, and ParameterError for too many bytes."""
        references = Counter(item["id"] for item in items if item["type"] == REFERENCE)
        if not references:
            return items
        named = self._named(owner, references)
        missing = next((item_id for item_id in references if item_id not in named), None)
        if missing is not None:
            raise HttpError(
                400, "item_not_found", f"input: item {missing[:60]!r} is not stored on this server", param="input"
            )
        size = sum([await size_of_json(named[item_id]) * count for item_id, count in references.items()])
        if size > most_bytes:
            reason = f"the referenced items have {size} bytes; the limit is {most_bytes}"
            raise ParameterError("input", f"{reason}; use previous_response_id instead")
        return [named[item["id"]] if item["type"] == REFERENCE else item for item in items]

    def _named(self, owner: str, wanted: Collection[str]) -> dict[str, Item]:
        found = dict[str, Item]()
        for stored in [stored for (of, _), stored in reversed(self._stored.items()) if of == owner]:
            for item in reversed((*stored.input_items, *stored.response["output"])):
                if item["id"] in wanted:
                    found.setdefault(item["id"], item)
            if len(found) == len(wanted):
                break
        return found

    def _make_room(self, more_bytes: int) -> None:
        counts, held_bytes = Counter[str](), Counter[str]()  # Keys are owners.
        for (name, _), stored in self._stored.items():
            counts[name] += 1
            held_bytes[name] += stored.held_bytes
        while (is_full := held_bytes.total() + more_bytes > self._max_bytes) or counts.total() >= self._max_responses:
            most = held_bytes if is_full else counts
            name = max(most, key=most.__getitem__)
            oldest = next(key for key in self._stored if key[0] == name)
            counts[name] -= 1
            held_bytes[name] -= self._stored.pop(oldest).held_bytes


@dataclass(slots=True, eq=False, weakref_slot=True)
class Storing:
    """Stores one response with its input. Only the first call of `complete` has an effect. On entry, the context
    manager stores the response from `prepare`. On exit, it deletes this response unless another version replaced it."""

    store: ResponseStore
    owner: str
    input_items: Sequence[Item]
    messages: Messages  # The chat before the answer.
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    is_done: bool = False  # True if the complete response is stored, or must not be stored any more.
    _begun: StoredResponse | None = None

    async def prepare(self, response: dict[str, Any]) -> None:
        self._begun = await stored_response(response, self.input_items, ())

    def __enter__(self) -> None:
        assert self._begun is not None, "the caller has called `prepare`"
        if not self.is_done:
            self.store.put(self.owner, self._begun)

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon(self._drop)  # `_put` may be scheduled already.

    def _drop(self) -> None:
        if not self.is_done and self._begun is not None:
            self.store.delete(self.owner, self._begun.response["id"])

    def complete(self, response: dict[str, Any]) -> None:
        """Stores the complete response. Thread-safe."""
        if not self.is_done:
            messages = (*self.messages, *messages_of(response["output"]))
            stored = StoredResponse(response, with_ids(self.input_items, response["id"]), messages)
            self._loop.call_soon_threadsafe(self._put, stored)

    def _put(self, stored: StoredResponse) -> None:
        if not self.is_done:
            self.is_done = True
            self.store.put(self.owner, stored)
