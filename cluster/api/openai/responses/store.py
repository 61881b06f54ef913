"""Responses that can be read again and followed, in memory and within bounds: the oldest give way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.cluster.api.error_shapes import to_json
from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.openai.responses.items import Item

MAX_RESPONSES: Final = 1024
MAX_BYTES: Final = 64 << 20

Messages = tuple[Mapping[str, Any], ...]


@dataclass(slots=True, eq=False)
class StoredResponse:
    """One response with what it answers."""

    response: dict[str, Any]  # as it is shown
    input_items: list[Item]
    messages: Messages  # of the chat, once it is complete with the answer; without instructions
    held_bytes: int = 0


class ResponseStore:
    """Use from one event loop."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._responses: dict[tuple[str, str], StoredResponse] = {}  # by owner and id, the oldest first
        self._held_bytes = 0

    def put(self, owner: str, stored: StoredResponse) -> None:
        """In the place of one of the same id; makes room. One that is too large alone is not stored."""
        key = (owner, stored.response["id"])
        self._remove(key)
        stored.held_bytes = len(to_json([stored.response, stored.input_items, stored.messages]))
        if stored.held_bytes > self._max_bytes:
            return
        self._responses[key] = stored
        self._held_bytes += stored.held_bytes
        while self._held_bytes > self._max_bytes or len(self._responses) > self._max_responses:
            self._remove(next(iter(self._responses)))

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        return self._responses.get((owner, response_id))

    def delete(self, owner: str, response_id: str) -> bool:
        """Whether it was there."""
        return self._remove((owner, response_id))

    def followed(self, owner: str, response_id: str) -> StoredResponse:
        """The complete one that a request follows. HttpError where there is none."""
        stored = self.get(owner, response_id)
        if stored is None or stored.response["status"] not in ("completed", "incomplete"):
            why = "is not stored here" if stored is None else f"is {stored.response['status']}"
            message = f"previous_response_id: response {response_id[:60]!r} {why}"
            raise HttpError(400, "previous_response_not_found", message, param="previous_response_id")
        return stored

    def _remove(self, key: tuple[str, str]) -> bool:
        stored = self._responses.pop(key, None)
        if stored is not None:
            self._held_bytes -= stored.held_bytes
        return stored is not None
