"""A chat as one request: what every API makes of its body, and the prompt that the model's template makes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum, auto
from itertools import chain
from typing import Any

from llamaclust.cluster.front.text.chat_format import AnswerReading, ReasoningBudget
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.threads import TEMPLATES, TOKENIZING, run_on
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales
from llamaclust.model.chat.accepted_messages import accepted_forms, lacks_system
from llamaclust.model.chat.prompt import guard_messages, unguarded
from llamaclust.model.chat.template import ChatTemplate, TemplateRefusalError
from llamaclust.model.chat.tools.begun_answer import continuation, ended_reasoning, opened_reasoning
from llamaclust.model.chat.tools.history import template_messages
from llamaclust.model.chat.tools.tool_format import ToolFormat
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "add_generation_prompt", "tools", "now_s"})

Variables = Mapping[str, Any]


class ToolMode(Enum):
    """Whether an answer calls tools."""

    AUTO = auto()  # as the model decides
    NONE = auto()
    REQUIRED = auto()  # at least one


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools an answer calls."""

    mode: ToolMode = ToolMode.AUTO
    name: str | None = None  # of the only one that may be called
    is_parallel: bool = True  # an answer may have several calls

    @classmethod
    def of(cls, mode: ToolMode, name: str | None, is_parallel: bool | None) -> ToolUse:
        """`is_parallel` None: one call where one is asked for, otherwise as many as the model makes."""
        return cls(mode, name, mode is not ToolMode.REQUIRED if is_parallel is None else is_parallel)

    def check(self, tools: Sequence[Variables]) -> None:
        """ParameterError for tools that contradict each other or this choice among them."""
        names = [tool["function"]["name"] for tool in tools]
        if len(set(names)) < len(names):
            raise ParameterError("tools", "two functions have the same name")
        if self.name is not None and self.name not in names:
            raise ParameterError("tool_choice", f"names {self.name[:60]!r}, which is not among the tools")
        if self.mode is ToolMode.REQUIRED and not names:
            raise ParameterError("tool_choice", "needs tools")


class PromptEnd(Enum):
    """What a rendered chat ends with."""

    GENERATION_PROMPT = auto()  # the beginning of a new answer
    LAST_MESSAGE = auto()  # the text of the last message, without its end: the answer continues it
    NOTHING = auto()  # the end of the last message


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat and how it is answered."""

    messages: tuple[Variables, ...]  # as chat templates know them: role, content, ...
    answer: CompletionRequest = field(default_factory=lambda: CompletionRequest(()))  # its prompt is the rendered chat
    tools: tuple[Variables, ...] = ()  # OpenAI's definitions; the template writes them
    variables: Variables = field(default_factory=dict)  # further ones of the template
    end: PromptEnd = PromptEnd.GENERATION_PROMPT
    tool_use: ToolUse = field(default_factory=ToolUse)
    splits_reasoning: bool = True  # reasoning is apart from the content
    may_reason: bool = True  # False: the prompt ends any reasoning that it begins
    reasoning_budget: ReasoningBudget | None = None
    created: float = field(default_factory=time.time)  # Unix time in seconds, which templates get as the present

    def admitted(self, created: float, adapters: AdapterScales) -> ChatRequest:
        """The same one of that time, answered with these adapters."""
        return replace(self, created=created, answer=replace(self.answer, adapters=adapters))

    @property
    def offered_tools(self) -> tuple[Variables, ...]:
        """Those that the model may call."""
        named = self.tool_use.name
        if self.tool_use.mode is ToolMode.NONE:
            return ()
        return tuple(tool for tool in self.tools if named is None or named == tool["function"]["name"])

    @property
    def uses_tools(self) -> bool:
        """True if it offers tools, or its messages have calls or results."""
        return bool(self.offered_tools) or any(
            message.get("tool_calls") or message.get("role") == "tool" for message in self.messages
        )

    @property
    def has_documents(self) -> bool:
        return bool(self.variables.get("documents"))

    def reading(self, form: ToolFormat, begun: str) -> AnswerReading | None:
        """How the answer is read; None: it is content as it stands."""
        schemas = {
            str(tool["function"]["name"]): tool["function"].get("parameters") or {} for tool in self.offered_tools
        }
        if not (schemas or form.dropped or form.knows_reasoning):
            return None
        most_calls = None if self.tool_use.is_parallel else 1
        may_be_unmarked = self.tool_use.mode is ToolMode.AUTO and self.answer.grammar is None
        return AnswerReading(
            form, schemas, self.splits_reasoning, most_calls, begun, reads_unmarked=bool(schemas) and may_be_unmarked
        )

    def count_characters(self) -> int:
        """Of all contents, reasoning, calls' arguments and tools: the prompt has about as many at least, unless its
        template leaves reasoning out. Large tools take long."""
        contents = [message.get(name) for message in self.messages for name in ("content", "reasoning_content")]
        calls = (call for message in self.messages for call in message.get("tool_calls") or ())
        texts = [*contents, *(call["function"].get("arguments") for call in calls)]
        tools = self.offered_tools
        written = len(json.dumps(tools, ensure_ascii=False)) if tools else 0
        return written + sum(len(text) for text in texts if isinstance(text, str))


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat's prompt, guarded (`model.chat.prompt`), and how its answer is read."""

    prompt: str
    reading: AnswerReading | None


def effort_variables(effort: str | None) -> dict[str, Any]:
    """Of a template, for an effort of reasoning. As llama.cpp: the template decides what it means."""
    if effort is None:
        return {}
    return {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}


def prompt_end(
    roles: Sequence[str], continue_final_message: bool | None, add_generation_prompt: bool | None
) -> PromptEnd:
    """By the roles of the messages and the fields of vLLM and Transformers. Without `continue_final_message` as
    llama.cpp: a last message of an assistant is continued unless a generation prompt is requested. ParameterError
    where they contradict each other."""
    is_answered = roles[-1:] == ["assistant"]
    if continue_final_message is None:
        continue_final_message = is_answered and not add_generation_prompt
        if continue_final_message and roles[-2:-1] == ["assistant"]:
            reason = "two messages of role assistant at the end: only one can be continued"
            raise ParameterError("messages", reason)
    elif continue_final_message and add_generation_prompt:
        raise ParameterError("continue_final_message", "excludes add_generation_prompt: true; set one of them")
    if continue_final_message:
        if not is_answered:
            raise ParameterError("continue_final_message", "needs a last message of role assistant")
        return PromptEnd.LAST_MESSAGE
    return PromptEnd.NOTHING if add_generation_prompt is False else PromptEnd.GENERATION_PROMPT


async def render(chat: ChatRequest, form: ToolFormat, template: ChatTemplate, tokenizer: Tokenizer) -> RenderedChat:
    """RequestError where the template refuses the messages in every form; where it refuses calls, they are text."""
    taken = _TEMPLATE_ARGUMENTS & chat.variables.keys()
    if taken:
        raise ParameterError("chat_template_kwargs", f"{min(taken)!r} cannot be set here")
    try:
        return await _render(chat, form, form, template, tokenizer)
    except TemplateRefusalError as refusal:
        if not any(message["role"] == "tool" or message.get("tool_calls") for message in chat.messages):
            raise
        textual = replace(form, takes_tool_role=False, takes_call_messages=False)
        try:
            return await _render(chat, form, textual, template, tokenizer)
        except TemplateRefusalError:
            raise refusal from None


async def _render(
    chat: ChatRequest, form: ToolFormat, history: ToolFormat, template: ChatTemplate, tokenizer: Tokenizer
) -> RenderedChat:
    """`history`: the format of the calls before the answer."""
    *messages, more = await run_on(TOKENIZING, _guarded, chat, history, tokenizer)
    more |= {"now_s": chat.created}
    if chat.end is not PromptEnd.LAST_MESSAGE:
        is_open = chat.end is PromptEnd.GENERATION_PROMPT
        text = await _accepted_text(template, messages, {**more, "add_generation_prompt": is_open})
        begun = "" if chat.may_reason or not is_open else ended_reasoning(form, text)
        return RenderedChat(text + begun, chat.reading(form, opened_reasoning(form, text) + begun))
    *before, last = messages
    text = await _accepted_text(template, before, {**more, "add_generation_prompt": True})
    content, thoughts = str(last.get("content") or ""), str(last.get("reasoning_content") or "")
    begun = continuation(form, text, thoughts, content, in_reasoning=bool(thoughts) and not content)
    return RenderedChat(text + begun, chat.reading(form, opened_reasoning(form, text) + unguarded(begun)))


async def _accepted_text(template: ChatTemplate, messages: list[dict[str, Any]], more: dict[str, Any]) -> str:
    """The text of the first form that the template renders whole, else of the first one that it renders.
    TemplateRefusalError where it refuses all, with what it says of the messages as they are."""
    refusal, shortened = None, None
    for accepted in chain([messages], accepted_forms(messages)):
        try:
            async with TEMPLATES.turn():
                text = await template.render_async(accepted, **more)
        except TemplateRefusalError as error:
            refusal = refusal or error
            continue
        if not lacks_system(messages, text):
            return text
        shortened = text if shortened is None else shortened
    if shortened is None:
        assert refusal is not None
        raise refusal
    return shortened


def _guarded(chat: ChatRequest, form: ToolFormat, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The messages for the template, and its variables behind them."""
    tools = chat.offered_tools
    adapted = template_messages(form, chat.messages, tools)
    defaults = {**_defaults(chat.created), "enable_thinking": chat.may_reason}
    return guard_messages([*adapted, {**defaults, **chat.variables, "tools": [*tools] or None}], tokenizer)


def _defaults(now_s: float) -> dict[str, Any]:
    """What llama.cpp gives to templates beside messages; some publishers' templates need it."""
    today = datetime.fromtimestamp(now_s).astimezone()
    return {
        "date_string": today.strftime("%d %b %Y"),
        "datetime": today.strftime("%b %d %Y"),
    }
