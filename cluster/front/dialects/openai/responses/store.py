"""Responses that can be read again and followed, in memory and within bounds: those of the owner with most give way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import Field

from llamaclust.cluster.front.dialects.openai.responses.items import REFERENCE, Item, summary_item
from llamaclust.cluster.front.dialects.openai.responses.output import ID_PREFIX, shown_usage
from llamaclust.cluster.front.dialects.openai.responses.schema import InputField, with_one_system_prompt
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.fields.sampling import AdapterFields
from llamaclust.cluster.front.foreign_fields import RESPONSES
from llamaclust.cluster.front.json_text import json_size
from llamaclust.cluster.front.replies.reply import Event, View
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest, ReasoningBudget
from llamaclust.core.errors import ParameterError
from llamaclust.model.chat.tools.events import ContentText

MAX_RESPONSES: Final = 1024
MAX_BYTES: Final = 64 << 20

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


@dataclass(slots=True)
class _Share:
    """What one owner has stored."""

    responses: dict[str, StoredResponse] = field(default_factory=dict)  # by id, the oldest first
    held_bytes: int = 0


class ResponseStore:
    """Use from one event loop."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._shares: dict[str, _Share] = {}  # by owner

    def put(self, owner: str, stored: StoredResponse) -> None:
        """In the place of one of the same id; makes room. One that is too large alone is not stored."""
        response_id = stored.response["id"]
        self.delete(owner, response_id)
        if stored.held_bytes > self._max_bytes:
            return
        self._make_room(stored.held_bytes)
        share = self._shares.setdefault(owner, _Share())
        share.responses[response_id] = stored
        share.held_bytes += stored.held_bytes

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        share = self._shares.get(owner)
        return None if share is None else share.responses.get(response_id)

    def delete(self, owner: str, response_id: str) -> bool:
        """Whether it was there."""
        share = self._shares.get(owner)
        stored = None if share is None else share.responses.pop(response_id, None)
        if share is None or stored is None:
            return False
        share.held_bytes -= stored.held_bytes
        if not share.responses:
            del self._shares[owner]
        return True

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
        share, found = self._shares.get(owner, _Share()), dict[str, Item]()
        for stored in reversed(share.responses.values()):
            for item in reversed((*stored.input_items, *stored.response["output"])):
                if item["id"] in wanted:
                    found.setdefault(item["id"], item)
            if len(found) == len(wanted):
                break
        return found

    def _make_room(self, more_bytes: int) -> None:
        """The oldest of the owner that has most give way."""
        while sum(share.held_bytes for share in self._shares.values()) + more_bytes > self._max_bytes:
            self._drop_oldest(max(self._shares, key=lambda owner: self._shares[owner].held_bytes))
        while sum(len(share.responses) for share in self._shares.values()) >= self._max_responses:
            self._drop_oldest(max(self._shares, key=lambda owner: len(self._shares[owner].responses)))

    def _drop_oldest(self, owner: str) -> None:
        self.delete(owner, next(iter(self._shares[owner].responses)))


MAX_TOKENS: Final = 1024
_TASK: Final = (
    "Summarize the conversation so far, so that it can be continued from your summary alone: what was asked, what was "
    "found and decided, names, numbers and open tasks. Reply with the summary only."
)


class CompactionBody(AdapterFields, foreign=RESPONSES):
    """`POST /v1/responses/compact`."""

    model: str
    """The served model's name; another name is refused."""
    input: InputField = Field(default_factory=list)
    """Text, or items, as of `POST /v1/responses`."""
    previous_response_id: str | None = Field(default=None, max_length=256)
    """A stored response: the chat that it ends comes before the input."""
    instructions: str | None = None
    """The chat's system prompt, which is not summarized."""

    def request(self, messages: Sequence[Mapping[str, Any]]) -> ChatRequest:
        """The chat, with the task at its end; greedy, without reasoning."""
        if not messages:
            raise ParameterError("input", "is missing")
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        chat = with_one_system_prompt([*instructions, *_with_task(messages)])
        answer = CompletionRequest((), MAX_TOKENS)
        return ChatRequest(chat, answer, may_reason=False, reasoning_budget=ReasoningBudget(0))


def _with_task(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """In a last message of the user that is there already: many templates want turns to alternate."""
    last = messages[-1]
    if last["role"] == "user":
        return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{_TASK}"}]
    return [*messages, {"role": "user", "content": _TASK}]


class CompactionView(View):
    """One summary; what exceeds `MAX_TOKENS` is cut off."""

    def __init__(self, reply_id: str, created: int, log: AnswerLog) -> None:
        self._reply_id = reply_id
        self._created = created
        self._log = log

    def frames(self, prompt: int, item: LogItem, *, is_large: bool) -> list[Event]:
        """See `View`. Summaries are not streamed."""
        return []

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> dict[str, Any]:
        """See `View`."""
        ((answer,),) = parts
        (generation,) = self._log.generations
        assert answer.timings is not None
        events = answer.events or (ContentText(answer.text),)
        summary = "".join(event.text for event in events if isinstance(event, ContentText)).strip()
        if not summary:
            raise HttpError(422, "summary_failed", "the model's summary is empty; keep the messages as they are")
        return {
            "id": ID_PREFIX + self._reply_id,
            "object": "response.compaction",
            "created_at": self._created,
            "output": [summary_item(f"cmp_{self._reply_id}", summary)],
            "usage": shown_usage(answer.timings, len(generation.prompt), len(answer.rows), 0),
        }
