"""Renders tool calls with a chat template, and checks what the grammar and the parser make of the text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from llguidance import LLMatcher

from llamaclust.core.errors import RequestError
from llamaclust.model.chat.template_probe import Render, difference, tools
from llamaclust.model.chat.tools.answer_parser import AnswerParser
from llamaclust.model.chat.tools.argument_values import type_name
from llamaclust.model.chat.tools.constraint.arguments_schema import arguments_schema
from llamaclust.model.chat.tools.constraint.call_grammar import CallStart, call_grammar
from llamaclust.model.chat.tools.events import ParsedAnswer
from llamaclust.model.chat.tools.format_derivation import derive_format
from llamaclust.model.chat.tools.history import template_messages
from llamaclust.model.chat.tools.tool_format import ChannelCalls, ToolFormat
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from support.chat.sample_templates import render_with

NAME: Final = "zqfirsttool"
OTHER_NAME: Final = "zqsecondtool"
MODES: Final = ("auto", "required", "named")
_USER: Final = {"role": "user", "content": "Question"}
_END: Final = 256
_CONTROL: Final = re.compile(r"<\|[^<>|]+\|>|</?tool_call>|<｜[^<>｜]+｜>|\[[A-Z_]+\]|]<]minimax\[>\[")
_RESULT_BEGIN: Final = "<|tool_response>"
"""Gemma's template begins the result behind a call. The answer ends there."""
_AFTER_CALLS: Final = re.compile(r"(<\|(call|eot|eot_id|im_end|tool_response|eom_id)\|>|\s)*")


def schema_of(value: Any) -> dict[str, Any]:
    properties = {"value": {"type": type_name(value)}, "other": {"type": "integer"}}
    return {"type": "object", "properties": properties, "required": ["value", "other"]}


@dataclass
class RenderedCalls:
    """A chat template and its format. If `has_controls`, markers are control tokens of the vocabulary."""

    render: Render
    form: ToolFormat
    has_controls: bool = False
    _matchers: dict[tuple[str, str], tuple[LLMatcher | None, str]] = field(default_factory=dict)

    def text(self, arguments: Mapping[str, Any]) -> str:
        """Returns what the template writes for a call after the prompt."""
        call = {"type": "function", "id": "zqcall001", "function": {"name": NAME, "arguments": arguments}}
        prompt = self._rendered([_USER], prompt=True)
        whole = self._rendered([_USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
        if isinstance(self.form.calls, ChannelCalls):
            assert whole.startswith(prompt)
            return whole[len(prompt) :]
        text = difference(whole, self._rendered([_USER, {"role": "assistant", "content": "Zqcontent9"}]))
        text = text.removesuffix(_RESULT_BEGIN)
        tags = self.form.reasoning
        return re.sub(rf"^\s*{re.escape(tags.begin)}\s*{re.escape(tags.end)}", "", text) if tags else text

    def refused(self, mode: str, text: str, value: Any) -> str:
        """Returns "" if the grammar of calls with such a value allows the text, or else the refused rest."""
        matcher, trigger = self._matcher(mode, value)
        if matcher is None:
            return ""
        begin = text.find(trigger)
        if begin < 0:
            return f"no {trigger!r} in {text!r}"
        ids = self._encoded(text[begin:] if trigger else text)
        matcher.reset()
        count = matcher.try_consume_tokens(ids)
        rest = b"".join(self._vocabulary.words[token].replace(b"\xff", b"") for token in ids[count:]).decode()
        return "" if matcher.is_accepting() and _AFTER_CALLS.fullmatch(rest) else repr(rest) or "the end"

    def read(self, pieces: Sequence[str], value: Any) -> Any:
        """Returns the arguments of the only call in an answer."""
        schema = schema_of(value)
        parser, answer = AnswerParser(self.form, {NAME: schema, OTHER_NAME: schema}), ParsedAnswer()
        for piece in pieces:
            answer.add(parser.feed(piece))
        answer.add(parser.end())
        if len(answer.calls) != 1 or answer.calls[0].name != NAME:
            return f"{len(answer.calls)} calls, content {answer.content!r}"
        try:
            return json.loads(answer.calls[0].arguments)
        except ValueError:
            return answer.calls[0].arguments

    def _rendered(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        shown = template_messages(self.form, messages, tools())
        return self.render(
            shown, prompt, {"tools": tools() if self.form.takes_tools else None, "enable_thinking": True}
        )

    def _matcher(self, mode: str, value: Any) -> tuple[LLMatcher | None, str]:
        key = (mode, type_name(value))
        if key not in self._matchers:
            schema = arguments_schema(schema_of(value)).schema
            offered = {NAME: schema} if mode == "named" else {NAME: schema, OTHER_NAME: schema}
            start = CallStart.TRIGGER if mode == "auto" else CallStart.ANSWER
            grammar = call_grammar(self.form, offered, self._split, start, is_parallel=mode == "auto")
            self._matchers[key] = (None, "")
            if grammar is not None:
                definition = json.dumps({"grammars": [{"lark_grammar": grammar.lark}]})
                made = LLMatcher(self._vocabulary.native, definition, log_level=0)
                assert not made.is_error(), made.get_error()
                self._matchers[key] = (made, grammar.triggers[0] if grammar.triggers else "")
        return self._matchers[key]

    @cached_property
    def _controls(self) -> Mapping[str, int]:
        if not self.has_controls:
            return {}
        marks = {found for text in self.form.markers for found in _CONTROL.findall(text)}
        return {mark: _END + 1 + place for place, mark in enumerate(sorted(marks))}

    @cached_property
    def _vocabulary(self) -> GrammarVocabulary:
        words = [*(bytes([byte]) for byte in range(256)), b"\xff<end>", *(b"\xff" + m.encode() for m in self._controls)]
        return GrammarVocabulary(words, [_END], lambda text: [*text.encode()])

    def _split(self, text: str) -> list[str | int]:
        if not self._controls:
            return [text]
        parts = re.split(f"({'|'.join(map(re.escape, self._controls))})", text)
        return [self._controls.get(part, part) for part in parts if part]

    def _encoded(self, text: str) -> list[int]:
        return [token for part in self._split(text) for token in ([part] if isinstance(part, int) else part.encode())]


def of_source(source: str, *, has_controls: bool = False) -> RenderedCalls:
    render = render_with(source)
    return RenderedCalls(render, derive_format(source, render), has_controls)


def is_same(left: Any, right: Any) -> bool:
    """Compares two JSON values. Numbers must have the same type and sign; keys may have any order."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def problems(calls: RenderedCalls, label: str, value: Any, draw: random.Random) -> list[str]:
    """Returns what goes wrong with a call whose argument is the value."""
    arguments = {"value": value, "other": 1}
    try:
        text = calls.text(arguments)
    except RequestError as error:
        return [f"{label}: not rendered: {error}"]
    found = [f"{label}: {mode} refuses {rest}" for mode in MODES if (rest := calls.refused(mode, text, value))]
    for pieces in ([text], [*text], random_pieces(draw, text)):
        read = calls.read(pieces, value)
        if not is_same(read, arguments):
            found.append(f"{label}: {text!r} is read as {read!r} in {len(pieces)} pieces")
    return found


def random_pieces(draw: random.Random, text: str) -> list[str]:
    cuts = sorted(draw.sample(range(len(text) + 1), draw.randint(0, min(len(text), 40))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
