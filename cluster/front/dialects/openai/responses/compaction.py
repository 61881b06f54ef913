"""`POST /v1/responses/compact`: the model writes a summary of a chat, with which later requests begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import Field

from llamaclust.cluster.front.dialects.openai.responses.items import summary_item
from llamaclust.cluster.front.dialects.openai.responses.response import ID_PREFIX, shown_usage
from llamaclust.cluster.front.dialects.openai.responses.schema import InputField, with_one_system_prompt
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.fields.adapters import AdapterFields
from llamaclust.cluster.front.replies.reply import Event, View
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.front.text.chat import ChatRequest
from llamaclust.cluster.front.text.reasoning import ReasoningBudget
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.core.errors import ParameterError
from llamaclust.model.chat.tools.events import ContentText

MAX_TOKENS: Final = 1024
_TASK: Final = (
    "Summarize the conversation so far, so that it can be continued from your summary alone: what was asked, what was "
    "found and decided, names, numbers and open tasks. Reply with the summary only."
)


class CompactionBody(AdapterFields):
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
