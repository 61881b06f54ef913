"""Responses that can be read again and followed, in memory and within bounds, and what clients do with them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from llamaclust.cluster.front.dialects.openai.response_items import REFERENCE, Item, messages_of, with_ids
from llamaclust.cluster.front.dialects.openai.response_schema import ID_PREFIX, Status
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.gates import owner
from llamaclust.cluster.front.http.responses import JsonResponse
from llamaclust.cluster.front.http.sse import rendered
from llamaclust.cluster.front.json_text import json_size
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Position, read_position
from llamaclust.core.errors import ClusterStoppingError, ParameterError

MAX_RESPONSES: Final = 1024
MAX_BYTES: Final = 64 << 20
_MOST_LISTED: Final = 100
_LISTED: Final = 20
_RUNNING: Final = (Status.QUEUED, Status.IN_PROGRESS)

Messages = tuple[Mapping[str, Any], ...]


@dataclass(slots=True, eq=False)
class StoredResponse:
    """One response with what it answers. Those with many numbers are made on a thread: their bytes are counted."""

    response: dict[str, Any]  # as it is shown
    input_items: list[Item]
    messages: Messages  # of the chat, once it is complete with the answer; without instructions
    held_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.held_bytes = json_size([self.response, self.input_items, self.messages])


class ResponseStore:
    """The oldest response of the owner who has most gives way. Use from one event loop."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: dict[tuple[str, str], StoredResponse] = {}  # by owner and id, the oldest first

    def put(self, owner: str, stored: StoredResponse) -> None:
        """Replaces one of the same id, and makes room. One that is too large alone is not stored."""
        self.delete(owner, stored.response["id"])
        if stored.held_bytes <= self._max_bytes:
            self._make_room(stored.held_bytes)
            self._stored[owner, stored.response["id"]] = stored

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        return self._stored.get((owner, response_id))

    def delete(self, owner: str, response_id: str) -> bool:
        """Returns true if it was there."""
        return self._stored.pop((owner, response_id), None) is not None

    def followed(self, owner: str, response_id: str) -> StoredResponse:
        """The complete one that a request follows. HttpError where there is none."""
        stored = self.get(owner, response_id)
        if stored is None or stored.response["status"] not in ("completed", "incomplete"):
            why = "is not stored here" if stored is None else f"is {stored.response['status']}"
            message = f"previous_response_id: response {response_id[:60]!r} {why}"
            raise HttpError(400, "previous_response_not_found", message, param="previous_response_id")
        return stored

    def resolved(self, owner: str, items: list[Item], most_bytes: int) -> list[Item]:
        """The items, in place of references those that they name. HttpError for a reference to none, ParameterError
        where they name more than `most_bytes`."""
        references = Counter(item["id"] for item in items if item["type"] == REFERENCE)
        if not references:
            return items
        named = self._named(owner, references)
        if missing := next((item_id for item_id in references if item_id not in named), None):
            raise HttpError(400, "item_not_found", f"input: item {missing[:60]!r} is not stored here", param="input")
        size = sum(json_size(named[item_id]) * count for item_id, count in references.items())
        if size > most_bytes:
            reason = f"its item references stand for {size} bytes, at most {most_bytes} are taken"
            raise ParameterError("input", f"{reason}; follow a response with previous_response_id instead")
        return [named[item["id"]] if item["type"] == REFERENCE else item for item in items]

    def _named(self, owner: str, wanted: Collection[str]) -> dict[str, Item]:
        """The items of these ids, each of the newest response that has it."""
        found = dict[str, Item]()
        for stored in [stored for (of, _), stored in reversed(self._stored.items()) if of == owner]:
            for item in reversed((*stored.input_items, *stored.response["output"])):
                if item["id"] in wanted:
                    found.setdefault(item["id"], item)
            if len(found) == len(wanted):
                break
        return found

    def _make_room(self, more_bytes: int) -> None:
        counts, held_bytes = Counter[str](), Counter[str]()  # by owner
        for (name, _), stored in self._stored.items():
            counts[name] += 1
            held_bytes[name] += stored.held_bytes
        while (is_full := held_bytes.total() + more_bytes > self._max_bytes) or counts.total() >= self._max_responses:
            most = held_bytes if is_full else counts
            name = max(most, key=most.__getitem__)
            oldest = next(key for key in self._stored if key[0] == name)
            counts[name] -= 1
            held_bytes[name] -= self._stored.pop(oldest).held_bytes


class Storing:
    """Stores a response once it is complete, with the items that it answers. All readers of a reply share one."""

    def __init__(self, store: ResponseStore, owner: str, input_items: Sequence[Item], messages: Messages) -> None:
        """`messages`: of the chat before the answer. Made on the event loop of the store."""
        self._store = store
        self._owner = owner
        self._input_items = input_items
        self._messages = messages
        self._loop = asyncio.get_running_loop()
        self._is_done = False

    def begin(self, response: dict[str, Any]) -> None:
        """Stores what a response answers that is computed in the background."""
        self._store.put(self._owner, self._stored(response, ()))

    def complete(self, response: dict[str, Any]) -> None:
        """Stores the response before its client has the end of it. May be called on any thread, by each reader."""
        stored = self._stored(response, (*self._messages, *messages_of(response["output"])))
        self._loop.call_soon_threadsafe(self._put, stored)

    def _stored(self, response: dict[str, Any], messages: Messages) -> StoredResponse:
        return StoredResponse(response, with_ids(self._input_items, response["id"]), messages)

    def _put(self, stored: StoredResponse) -> None:
        if not self._is_done:
            self._is_done = True
            self._store.put(self._owner, stored)


class StoredResponses:
    """Reads responses, also those that are computed in the background, and ends them."""

    def __init__(self, replies: Replies, store: ResponseStore) -> None:
        self._replies = replies
        self._store = store

    async def retrieve(self, request: Request) -> Response:
        """A response as it is; `?stream=true`: the events of one that was streamed in the background, after the one of
        number `starting_after`."""
        if request.query_params.get("stream", "false").lower() in ("true", "1"):
            return await self._events(request)
        return rendered(await self._shown(request))

    async def cancel(self, request: Request) -> Response:
        """Ends a response that is computed in the background."""
        kept, response = self._kept(request), await self._shown(request)
        if not response["background"]:
            raise HttpError(
                400, "not_in_background", f"response {response['id']} was not created with background: true"
            )
        if kept is not None and response["status"] in _RUNNING:
            response = {**response, "status": Status.CANCELLED}
            begun = self._store.get(self._owner(request), response["id"])
            items = [] if begun is None else begun.input_items
            self._store.put(self._owner(request), StoredResponse(response, items, ()))
            await self._replies.cache.forget(kept)
        return rendered(response)

    async def delete(self, request: Request) -> Response:
        """Ends a response that runs, and forgets it."""
        kept = self._kept(request)
        is_stored = self._store.delete(self._owner(request), request.path_params["id"])
        if kept is not None:
            await self._replies.cache.forget(kept)
        elif not is_stored:
            raise self._not_found(request)
        return JsonResponse({"id": request.path_params["id"], "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """What a response answered; the newest item first unless `order=asc`."""
        stored = self._store.get(self._owner(request), request.path_params["id"])
        if stored is None:
            raise self._not_found(request)
        items = stored.input_items if request.query_params.get("order") == "asc" else stored.input_items[::-1]
        after = request.query_params.get("after")
        place = next((place for place, item in enumerate(items) if item["id"] == after), -1)
        if after is not None and place < 0:
            raise HttpError(400, "bad_item_id", f"after: {after[:60]!r} is no item of this response", param="after")
        most = _number(request, "limit", _LISTED)
        if not 1 <= most <= _MOST_LISTED:
            raise HttpError(400, "bad_limit", f"limit: {most} is not within 1..{_MOST_LISTED}", param="limit")
        rest = items[place + 1 :]
        shown = rest[:most]
        ends = (
            {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
        )
        return rendered({"object": "list", "data": shown, **ends, "has_more": len(rest) > most})

    async def _events(self, request: Request) -> Response:
        kept = self._kept(request)
        if kept is None or not kept.context.is_streamed:
            await self._shown(request)
            raise HttpError(
                400, "not_streamed", "only responses of background: true and stream: true can be streamed again"
            )
        after = Position()
        if "starting_after" in request.query_params:
            after = read_position(str(_number(request, "starting_after", 0) + 1), "starting_after")
        return await self._replies.respond(request, kept, after)

    async def _shown(self, request: Request) -> dict[str, Any]:
        """HttpError where there is none."""
        stored = self._store.get(self._owner(request), request.path_params["id"])
        if stored is not None and stored.response["status"] not in _RUNNING:
            return stored.response
        kept = self._kept(request)
        if kept is None:
            raise self._not_found(request)
        kept.resume()
        if kept.log.is_over and kept.error is None:  # the store has no room for it any more, or gets it now
            complete: dict[str, Any] = await kept.value()
            return complete
        return _unended(kept, request.path_params["id"])

    def _kept(self, request: Request) -> KeptReply | None:
        """The reply of a response in the background; others are kept too."""
        name = request.path_params["id"]
        kept = self._replies.cache.named(self._owner(request), name) if name.startswith(ID_PREFIX) else None
        return kept if kept is not None and kept.context.is_background else None

    def _owner(self, request: Request) -> str:
        return owner(request.headers, self._replies.settings.api_keys)

    def _not_found(self, request: Request) -> HttpError:
        return HttpError(404, "response_not_found", f"no response {request.path_params['id'][:60]!r} is stored here")


def _unended(kept: KeptReply, response_id: str) -> dict[str, Any]:
    """A response that is not stored yet. One that waits for its turn after a restart is known by its id alone."""
    known = kept.acknowledgement
    shown: dict[str, Any] = {"id": response_id, "object": "response", "created_at": kept.context.created}
    shown |= {"background": True, "output": []} if known is None else json.loads(known)
    if isinstance(kept.error, ClusterStoppingError):  # the next coordinator computes it on
        raise kept.error
    if kept.error is not None:
        error = {"code": "server_error", "message": str(kept.error)}
        return {**shown, "status": Status.FAILED, "error": error}
    return {**shown, "status": Status.QUEUED if known is None else Status.IN_PROGRESS}


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise HttpError(400, "bad_number", f"{name}: {text[:60]!r} is not a number", param=name)
    return int(text)
