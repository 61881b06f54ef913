"""Builds and checks grammars of answers to requests with tools, over a small byte-level vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaclust.cluster.front.text.call_constraint import answer_grammar
from llamaclust.cluster.front.text.request import AnswerParsing, ChatRequest, CompletionRequest, ToolMode, ToolUse
from llamaclust.cluster.front.text.sharing import ignored_parts
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars.checker import GrammarChecker
from llamaclust.model.grammars.matcher import compiled
from llamaclust.model.grammars.vocabulary import read_vocabulary
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.chat.sample_templates import form_of
from support.models.tiny_tokenizers import byte_level

TOKENIZER = load_tokenizer(byte_level(330))
VOCABULARY = read_vocabulary(TOKENIZER, 330)


async def bound(
    checker: GrammarChecker,
    tools: Mapping[str, Any],
    mode: ToolMode = ToolMode.REQUIRED,
    form: str = "hermes",
    other: Grammar | None = None,
) -> tuple[Grammar | None, list[str]]:
    """Returns the grammar of an answer and the ignored parts that the reply names."""
    definitions_of_tools = tuple({"type": "function", "function": {"name": name}} for name in tools)
    chat = ChatRequest((), CompletionRequest((), grammar=other), definitions_of_tools, tool_use=ToolUse(mode))
    named: list[str] = []
    token = ignored_parts.set(named)
    try:
        return await answer_grammar(chat, AnswerParsing(form_of(form), tools), TOKENIZER, checker), named
    finally:
        ignored_parts.reset(token)


def allows(grammar: Grammar | None, *texts: str) -> list[bool]:
    """Tells for each text whether the grammar allows it as a whole answer."""
    assert grammar is not None
    matcher, found = compiled(grammar.definition, VOCABULARY), []
    for text in texts:
        matcher.reset()
        ids = TOKENIZER.encode(text, add_special=False)
        found.append(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())
    return found


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
