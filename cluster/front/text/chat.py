"""Renders chats as prompts with the model's chat template. The format of answers is derived from the template."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain
from types import MappingProxyType
from typing import Any, Final

from llamaclust.cluster.front.text.images import (
    ImageMarkers,
    ImageSource,
    Part,
    PromptImages,
    own_fields,
    source_of,
    text_part,
)
from llamaclust.cluster.front.text.request import (
    AnswerParsing,
    ChatRequest,
    CompletionRequest,
    PromptEnd,
    ReasoningBudget,
)
from llamaclust.cluster.front.text.sharing import RENDERING, TEMPLATES, TOKENIZING, run_on, tokenizing
from llamaclust.cluster.scheduler.requests import Operation
from llamaclust.core.errors import DeadlineError, ParameterError, RequestError
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS, MAX_TRIGGER_BYTES
from llamaclust.core.sampler.matchers import Grammar, Reasoning
from llamaclust.model.chat.accepted_messages import accepted_forms, lacks_system
from llamaclust.model.chat.prompt import encode_chat, encode_text, guard_messages, unguarded
from llamaclust.model.chat.template import ChatTemplate, TemplateRefusalError
from llamaclust.model.chat.thoughts import with_shown_thoughts
from llamaclust.model.chat.tools.begun_answer import continuation, ended_reasoning, opened_reasoning
from llamaclust.model.chat.tools.format_derivation import derive_format
from llamaclust.model.chat.tools.history import template_messages
from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS
from llamaclust.model.chat.tools.tool_format import ChannelCalls, ToolFormat
from llamaclust.model.grammars.reasoning import Place, ReasoningScanner
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.wire.rpc.deadlines import deadline

_TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "add_generation_prompt", "tools", "now_s"})


_HINTS: Final = ("tool", "think", "reason", "channel", "function", "response", "THINK", "RESPONSE")
"""A template with tool calls or reasoning contains one of these words. Other templates are not analysed."""
_PART_TYPES: Final = ("'type'", '"type"', ".type")
"""A template that reads contents as lists of parts contains one of these texts."""
_PROBE: Final = "probe of a content"
_UNKNOWN: Final = "probe_of_a_field"
_MAX_PROBES: Final = 16
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_MAX_DERIVATION_S: Final = 60.0
"""Maximum seconds for deriving the format of answers. After a failure, the next chat tries again."""
_MAX_WAIT_S: Final = 120.0
"""Maximum seconds that a chat waits while another chat derives the format of answers."""

PLAIN: Final = ToolFormat(GENERIC_CALLS, takes_tool_role=False, takes_call_messages=False)


class ChatFormat:
    """Renders prompts with a chat template, and derives the format of answers from the template."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._lock = asyncio.Lock()
        self._form: ToolFormat | None = None
        self._control_ids: frozenset[int] = frozenset()
        self._takes_parts = False

    async def get(self) -> ToolFormat:
        """Returns the format of answers. The first call derives it. Raises DeadlineError if this takes too long."""
        async with deadline("the analysis of the chat template", _MAX_WAIT_S), self._lock:
            if self._form is None:
                self._takes_parts = await run_on(RENDERING, self._needs_parts)
                form = await run_on(RENDERING, self._derived)
                controls = [text for text in self._tokenizer.control_texts if len(text) > 1]
                shown = [text for text in controls if any(text in marker for marker in form.markers)]
                found = (self._tokenizer.token_id(text) for text in shown)
                self._control_ids = frozenset(token_id for token_id in found if token_id is not None)
                self._form = form
        return self._form

    async def text(self, chat: ChatRequest) -> str:
        """Returns the rendered prompt, with llama.cpp's media marker in place of each image."""
        markers = ImageMarkers()
        text, _ = await self._rendered(await self._marked(chat, markers))
        return markers.public(unguarded(text))

    async def completion(self, chat: ChatRequest, check: Callable[[int], None]) -> CompletionRequest:
        """Returns the completion request of a chat. `check` raises an error if the prompt has too many characters."""
        markers = ImageMarkers()
        chat = await self._marked(chat, markers)
        check(await run_on(TOKENIZING, chat.count_characters))
        text, reading = await self._rendered(chat)
        check(len(unguarded(text)))
        prompt = await run_on(tokenizing(len(text)), self._encoded, markers.split(text), chat.images)
        reading = reading and replace(reading, shown_control_ids=self._control_ids)
        return replace(chat.answer, prompt=prompt, reading=reading, operation=Operation.CHAT)

    async def _marked(self, chat: ChatRequest, markers: ImageMarkers) -> ChatRequest:
        fields = own_fields(chat.messages)
        keeps_texts = bool(fields) and await run_on(RENDERING, self._reads, fields, chat)
        return replace(chat, messages=markers.mark(chat.messages, keeps_texts=keeps_texts))

    def _encoded(self, pieces: Sequence[Part], images: Mapping[str, bytes]) -> tuple[int, ...] | PromptImages:
        first, *others = pieces
        ids = tuple(encode_chat(self._tokenizer, str(first)))
        if not others:
            return ids
        return PromptImages((ids, *(self._piece(piece, images) for piece in others)))

    def _piece(self, piece: Part, images: Mapping[str, bytes]) -> tuple[int, ...] | ImageSource:
        if isinstance(piece, str):
            return tuple(encode_text(self._tokenizer, piece))
        return source_of(piece, images)

    async def _rendered(self, chat: ChatRequest) -> tuple[str, AnswerParsing | None]:
        """Returns the rendered prompt, which may contain GUARD (see `_guarded`), and how to parse the answer."""
        form = await self.get()
        taken = _TEMPLATE_ARGUMENTS & (chat.variables.keys() | chat.thoughts.variables.keys())
        if taken:
            raise ParameterError("chat_template_kwargs", f"{min(taken)!r} cannot be set by a request; remove it")
        if chat.end is PromptEnd.LAST_MESSAGE and chat.messages[-1].get("tool_calls"):
            raise ParameterError("messages", "the chat ends with tool_calls: add a message of role tool for each")
        try:
            return await self._render(chat, form, form)
        except TemplateRefusalError as refusal:
            if not any(message["role"] == "tool" or message.get("tool_calls") for message in chat.messages):
                raise
            textual = replace(form, takes_tool_role=False, takes_call_messages=False)
            try:
                return await self._render(chat, form, textual)
            except TemplateRefusalError:
                raise refusal from None

    async def _render(
        self, chat: ChatRequest, form: ToolFormat, history: ToolFormat
    ) -> tuple[str, AnswerParsing | None]:
        *messages, more = await run_on(TOKENIZING, self._guarded, chat, history)
        more |= {"now_s": chat.created}
        if chat.end is not PromptEnd.LAST_MESSAGE:
            is_open = chat.end is PromptEnd.GENERATION_PROMPT
            text = await self._accepted_text(form, messages, {**more, "add_generation_prompt": is_open})
            begun = "" if chat.thoughts.are_allowed or not is_open else ended_reasoning(form, text)
            return text + begun, chat.reading(form, opened_reasoning(form, text) + begun)
        *before, last = messages
        text = await self._accepted_text(form, before, {**more, "add_generation_prompt": True})
        content, thoughts = str(last.get("content") or ""), str(last.get("reasoning_content") or "")
        begun = continuation(form, text, thoughts, content, in_reasoning=bool(thoughts) and not content)
        return text + begun, chat.reading(form, opened_reasoning(form, text) + unguarded(begun))

    async def _accepted_text(self, form: ToolFormat, messages: list[dict[str, Any]], more: dict[str, Any]) -> str:
        """Renders the messages in a form that the template accepts. Raises TemplateRefusalError if there is none."""
        refusal, shortened = None, None
        has_parts = any(isinstance(message.get("content"), list) for message in messages)
        for accepted in chain([messages], () if has_parts else accepted_forms(messages)):
            shown = [with_shown_thoughts(form, message) for message in accepted]
            shown = [*map(_with_parts, shown)] if self._takes_parts else shown
            try:
                async with TEMPLATES.turn():
                    text = await self._template.render_async(shown, **more)
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

    def _guarded(self, chat: ChatRequest, history: ToolFormat) -> list[dict[str, Any]]:
        """Returns the messages, with the template variables as the last item. GUARD keeps texts such as `<s>` plain."""
        tools, today = chat.offered_tools, datetime.fromtimestamp(chat.created).astimezone()
        variables = {
            "date_string": today.strftime("%d %b %Y"),
            "datetime": today.strftime("%b %d %Y"),
            **chat.thoughts.template_variables,
            **chat.variables,
            "tools": [*tools] or None,
        }
        return guard_messages([*template_messages(history, chat.messages, tools), variables], self._tokenizer)

    def _needs_parts(self) -> bool:
        """Returns True if the template renders contents only as lists of parts. Some vision models' templates do so."""
        source = self._template.source or ""
        if not any(word in source for word in _PART_TYPES):
            return False
        message = {"role": "user", "content": _PROBE}
        forms = ([message], [_with_parts(message)])
        with_text, with_parts = (_PROBE in self._rendered_or_empty(messages) for messages in forms)
        return with_parts and not with_text

    def _reads(self, fields: Sequence[Mapping[str, Any]], chat: ChatRequest) -> bool:
        """Returns True if the template shows a text, and shows it otherwise with some of its own fields. A template
        that also shows a field which no template can know writes out the whole list."""
        more = {**chat.variables, "now_s": chat.created}

        def shown(own: Mapping[str, Any]) -> str:
            part = {_UNKNOWN: _UNKNOWN, **own, **text_part(_PROBE)}
            return self._rendered_or_empty([{"role": "user", "content": [part]}], more)

        without = shown({})
        with_fields = map(shown, fields[:_MAX_PROBES])
        return any(_PROBE in each and _UNKNOWN not in each and each != without for each in with_fields)

    def _rendered_or_empty(self, messages: Sequence[Mapping[str, Any]], more: Mapping[str, Any] = _NOTHING) -> str:
        try:
            return self._template.render(messages, **more)
        except RequestError:
            return ""

    def _derived(self) -> ToolFormat:
        source = self._template.source or ""
        if not any(hint in source for hint in _HINTS):
            return PLAIN
        end = time.monotonic() + _MAX_DERIVATION_S

        def render(messages: Sequence[Mapping[str, Any]], prompt: bool, variables: Mapping[str, Any]) -> str:
            if time.monotonic() > end:
                raise DeadlineError(f"analysing the chat template took longer than {_MAX_DERIVATION_S:g} s; try again")
            return self._template.render(messages, prompt, **variables)

        return derive_format(source, render)


def _with_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [text_part(content)]} if isinstance(content, str) else dict(message)


def answer_reasoning(
    reading: AnswerParsing | None, budget: ReasoningBudget | None, grammar: Grammar | None, tokenizer: Tokenizer
) -> Reasoning | None:
    """Returns the tags that enclose reasoning in the answer, or None if the engine need not track reasoning. Raises
    ParameterError if the budget's message contains the end tag."""
    calls_end = reading is not None and reading.form.calls_end_reasoning and (grammar is None or bool(grammar.triggers))
    found = None if reading is None else _open_or_closed(reading, calls_end=calls_end)
    if found is None:
        return None
    delays = grammar is not None and (found.is_open or bool(grammar.triggers)) and not calls_end
    if budget is None:
        return replace(found, delays_grammar=True) if delays else None
    if any(end in budget.message for end in found.ends):
        raise ParameterError("reasoning_budget_message", "has the tag that ends the reasoning; remove the tag")
    forced = tokenizer.encode_plain(budget.message, after_special=False) if budget.message else []
    for part in tokenizer.split_special(found.ends[0], parse_special=True):
        forced += tokenizer.encode_plain(part, after_special=False) if isinstance(part, str) else [part]
    tokens = min(budget.tokens, MAX_CONTEXT_TOKENS)
    return replace(found, forced=tuple(forced), budget=tokens, delays_grammar=delays)


def _open_or_closed(reading: AnswerParsing, *, calls_end: bool) -> Reasoning | None:
    """Returns the reasoning tags, or None if there are no usable tags or the reasoning has ended."""
    found = _tags(reading.form)
    if found is None or any(len(text.encode()) > MAX_TRIGGER_BYTES for text in (*found.begins, *found.ends)):
        return None
    if reading.tools and calls_end and not isinstance(reading.form.calls, ChannelCalls | None):
        found = replace(found, ends=(*found.ends, *reading.form.calls.frame.triggers))
    scanner = ReasoningScanner(found)
    scanner.feed(reading.begun.encode())
    return None if scanner.place is Place.BEHIND else replace(found, is_open=scanner.place is Place.INSIDE)


def _tags(form: ToolFormat) -> Reasoning | None:
    calls, tags = form.calls, form.reasoning
    if tags is not None:
        return Reasoning((tags.begin,), tags.ends, repeats=tags.repeats)
    if not isinstance(calls, ChannelCalls) or not calls.message_ends or calls.reasoning_header == calls.content_header:
        return None
    return Reasoning((calls.reasoning_header + calls.header_end,), calls.message_ends, repeats=True)
