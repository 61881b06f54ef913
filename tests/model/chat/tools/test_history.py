"""Checks that tools and calls are written in messages if the template does not show them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from llamaclust.model.chat.tools.answer_parser import AnswerParser
from llamaclust.model.chat.tools.argument_values import type_name
from llamaclust.model.chat.tools.constraint.arguments_schema import arguments_schema
from llamaclust.model.chat.tools.constraint.call_grammar import CallStart, call_grammar
from llamaclust.model.chat.tools.events import ParsedAnswer
from llamaclust.model.chat.tools.history import template_messages
from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS, KNOWN_FORMATS, SHOWN_CALLS
from llamaclust.model.chat.tools.tool_format import NamedCalls, ToolFormat
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from support.chat.sample_templates import form_of

TOOL = {"type": "function", "function": {"name": "look"}}
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("takes_system_role", [True, False])
@pytest.mark.parametrize("messages", [[], [USER], [SYSTEM, USER], [USER, SYSTEM]])
def test_tools_are_described_in_the_first_message(messages: list[dict[str, Any]], takes_system_role: bool) -> None:
    made = template_messages(ToolFormat(GENERIC_CALLS, takes_system_role=takes_system_role), messages, [TOOL])
    first, *others = made
    assert '"name": "look"' in first["content"]
    has_message = bool(messages) and (messages[0] == SYSTEM or not takes_system_role)
    assert others == messages[has_message:]
    assert first["role"] == (messages[0]["role"] if has_message else "system" if takes_system_role else "user")


_ARGUMENTS = {"path": "a.py", "text": '    "say"\n\n', "lines": [1, 2], "is_deep": True, "none": None}
_CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": json.dumps(_ARGUMENTS)}},
    {"id": "call_7", "type": "function", "function": {"name": "stop", "arguments": {}}},
]
_SCHEMAS = {
    "look": {
        "type": "object",
        "properties": {key: {"type": type_name(value)} for key, value in _ARGUMENTS.items()},
        "required": [*_ARGUMENTS],
    },
    "stop": {"type": "object", "properties": {}},
}
_FORMATS = {
    **{known.marks[0]: known.calls for known in KNOWN_FORMATS if isinstance(known.calls, NamedCalls)},
    **{marks[-1]: calls for marks, calls in SHOWN_CALLS},
    "lfm2": form_of("lfm2").calls,
}


@pytest.mark.parametrize("name", _FORMATS)
def test_calls_that_a_template_omits_are_written_in_its_notation(name: str) -> None:
    form = ToolFormat(_FORMATS[name], takes_call_messages=False)
    message = {"role": "assistant", "content": "Wait.", "tool_calls": _CALLS}
    (shown,) = template_messages(form, [message], [])
    assert "tool_calls" not in shown and shown["content"].startswith("Wait.\n")
    text = shown["content"].removeprefix("Wait.\n")
    answer, parser = ParsedAnswer(), AnswerParser(form, _SCHEMAS)
    answer.add(parser.feed(text))
    answer.add(parser.end())
    read = [(call.name, json.loads(call.arguments)) for call in answer.calls]
    assert read == [("look", _ARGUMENTS), ("stop", {})] and not answer.content
    schemas = {tool: arguments_schema(schema).schema for tool, schema in _SCHEMAS.items()}
    grammar = call_grammar(form, schemas, lambda part: [part], CallStart.ANSWER, is_parallel=True)
    assert grammar is not None
    words = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]
    vocabulary = GrammarVocabulary(words, [256], lambda part: [*part.encode()])
    matcher = LLMatcher(vocabulary.native, json.dumps({"grammars": [{"lark_grammar": grammar.lark}]}), log_level=0)
    assert matcher.try_consume_tokens([*text.encode()]) == len(text.encode()) and matcher.is_accepting()
