"""Constrains the answers to chats. A tool call must match the schema of its tool. Any other answer must have the form
that the request sets."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

from llamaclust.cluster.front.text.request import AnswerParsing, ChatRequest, ToolMode
from llamaclust.cluster.front.text.sharing import TOKENIZING, current_owner, report_ignored, run_on
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.chat.tools.call_sink import Schema, Tools
from llamaclust.model.chat.tools.constraint.arguments_schema import ANY_ARGUMENTS, arguments_schema
from llamaclust.model.chat.tools.constraint.call_grammar import CallStart, call_grammar
from llamaclust.model.grammars.checker import GrammarChecker, GuardedGrammarError
from llamaclust.model.grammars.definitions import either, lazy, of_calls
from llamaclust.model.grammars.normal_schema import NormalSchema
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_ORIGIN: Final = "tools"
_MOST_CHECKS: Final = 64
"""Maximum number of checks to find tools with unsupported schemas. Tools that were not checked are not constrained."""

_log = logging.getLogger(__name__)


async def answer_grammar(
    chat: ChatRequest, reading: AnswerParsing | None, tokenizer: Tokenizer, checker: GrammarChecker
) -> Grammar | None:
    """Returns the grammar of a chat's answer. Raises ParameterError if required calls or the answer's format cannot be
    enforced, and DeadlineError if a check takes too long."""
    is_required, other = chat.tool_use.mode is ToolMode.REQUIRED, chat.answer.grammar
    if reading is None or not reading.tools:
        return other
    if other is not None and not is_required:
        other = await checker.check(other, current_owner.get())
    calls = _Calls(chat, reading, None if is_required else other, tokenizer, checker)
    schemas = await run_on(TOKENIZING, _normal, reading.tools)
    try:
        grammar, free = await calls.find({name: normal.schema for name, normal in schemas.items()})
    except ParameterError as error:
        if is_required:
            raise
        _log.info("calls are not constrained: %s", error)
        grammar, free = None, set()
    report_ignored(_unobeyed(schemas, schemas if grammar is None else free))
    return other if grammar is None else grammar


def _normal(tools: Tools) -> dict[str, NormalSchema]:
    return {name: arguments_schema(schema) for name, schema in tools.items()}


def _unobeyed(schemas: Mapping[str, NormalSchema], free: Iterable[str]) -> list[str]:
    """Returns the parts of tool schemas that are not enforced, as paths such as `tools.NAME.PLACE`."""
    free = frozenset(free)
    names = []
    for name, normal in schemas.items():
        places = ("",) if name in free else normal.unobeyed
        names += [f"{_ORIGIN}.{name}.{place}".rstrip(".") for place in places]
    return names


class _Calls:
    def __init__(
        self,
        chat: ChatRequest,
        reading: AnswerParsing,
        other: Grammar | None,
        tokenizer: Tokenizer,
        checker: GrammarChecker,
    ) -> None:
        self._use = chat.tool_use
        self._reading = reading
        self._other = other
        self._tokenizer = tokenizer
        self._checker = checker
        self._checks = 0
        # True once a check took too much time or memory. Further checks could too, so the search for single tools ends.
        self._is_over = False

    async def find(self, tools: Tools) -> tuple[Grammar | None, set[str]]:
        try:
            return await self._check(tools), set()
        except ParameterError:
            free = await self._refused(tools)
        while True:
            try:
                return await self._check({**tools, **dict.fromkeys(free, ANY_ARGUMENTS)}), free
            except ParameterError:
                if len(free) == len(tools):
                    raise
                bound = {name: schema for name, schema in tools.items() if name not in free}
                free |= {*bound} if self._is_over else _largest_half(bound)

    async def _refused(self, tools: Tools) -> set[str]:
        if self._checks >= _MOST_CHECKS or self._is_over:
            return {*tools}
        try:
            await self._check(tools)
        except ParameterError:
            if len(tools) == 1:
                return {*tools}
            names = [*tools]
            halves = names[: len(names) // 2], names[len(names) // 2 :]
            parts = [await self._refused({name: tools[name] for name in half}) for half in halves]
            return parts[0] | parts[1]
        return set()

    async def _check(self, tools: Tools) -> Grammar | None:
        self._checks += 1
        grammar = await run_on(TOKENIZING, self._grammar, tools)
        try:
            return None if grammar is None else await self._checker.check(grammar, current_owner.get())
        except GuardedGrammarError:
            self._is_over = True
            raise

    def _grammar(self, tools: Tools) -> Grammar | None:
        """Returns the grammar of tool calls, or None if the model's calls begin without a marker."""
        if self._use.mode is ToolMode.REQUIRED:
            start = CallStart.THOUGHT if self._reading.is_thinking else CallStart.ANSWER
        else:
            start = CallStart.TRIGGER if self._other is None else CallStart.ALTERNATIVE
        split = partial(_pieces, self._tokenizer)
        found = call_grammar(self._reading.form, tools, split, start, is_parallel=self._use.is_parallel)
        if found is None:
            return None
        if self._other is not None:
            return either(found.lark, self._other)
        grammar = of_calls(found.lark, _ORIGIN)
        return lazy(grammar, found.triggers) if found.triggers else grammar


def _largest_half(tools: Mapping[str, Schema]) -> set[str]:
    """Returns the names of half of the tools: those with the longest schemas."""
    names = sorted(tools, key=lambda name: -len(str(tools[name])))
    return {*names[: -(-len(names) // 2)]}


def _pieces(tokenizer: Tokenizer, text: str) -> list[str | int]:
    pieces: list[str | int] = []
    for piece in tokenizer.split_special(text, parse_special=True):
        shown = piece if isinstance(piece, str) or tokenizer.is_control(piece) else tokenizer.token_text(piece)
        if isinstance(shown, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += shown
        else:
            pieces.append(shown)
    return pieces
