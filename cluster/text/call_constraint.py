"""Binds the calls in a chat's answer to the schemas of its tools."""

from __future__ import annotations

import json
import logging
from functools import partial

from llamaclust.cluster.text.chat import ChatRequest, ToolMode
from llamaclust.cluster.text.chat_format import AnswerReading
from llamaclust.cluster.text.owner import current_owner
from llamaclust.cluster.text.threads import TOKENIZING, run_on
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling import Grammar
from llamaclust.core.sampling_bounds import MAX_GRAMMAR_BYTES
from llamaclust.model.chat.tools.constraint.call_grammar import CallGrammar, call_grammar
from llamaclust.model.grammars.checker import GrammarChecker
from llamaclust.model.grammars.definitions import lazy, of_lark
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_ORIGIN = "tools"
_log = logging.getLogger(__name__)


async def answer_grammar(
    chat: ChatRequest, reading: AnswerReading | None, tokenizer: Tokenizer, checker: GrammarChecker
) -> Grammar | None:
    """The grammar of a chat's answer: the request's own, or that of its calls. Schemas that cannot be obeyed leave
    calls that the model chooses free; ParameterError where a call is required. DeadlineError for a check that was
    late."""
    own, use = chat.answer.grammar, chat.tool_use
    is_required = use.mode is ToolMode.REQUIRED
    if own is not None and is_required:
        raise ParameterError("tool_choice", f"a required call cannot be used together with {own.origin}")
    if own is not None or reading is None or not reading.tools:
        return own
    try:
        found = await run_on(TOKENIZING, _call_grammar, chat, reading, tokenizer)
        if found is None:
            return None
        grammar = of_lark(found.lark, _ORIGIN)
        if found.triggers:
            grammar = lazy(grammar, found.triggers)
        return await checker.check(grammar, current_owner.get())
    except ParameterError as error:
        if is_required:
            raise
        _log.info("calls are not constrained: %s", error)
        return None


def _call_grammar(chat: ChatRequest, reading: AnswerReading, tokenizer: Tokenizer) -> CallGrammar | None:
    size = len(json.dumps(reading.tools, ensure_ascii=False))
    if size > MAX_GRAMMAR_BYTES:
        raise ParameterError(_ORIGIN, f"schemas of {size} characters, at most {MAX_GRAMMAR_BYTES} are taken")
    return call_grammar(
        reading.form,
        reading.tools,
        partial(_pieces, tokenizer),
        is_required=chat.tool_use.mode is ToolMode.REQUIRED,
        is_parallel=chat.tool_use.is_parallel,
        is_thinking=reading.is_thinking,
    )


def _pieces(tokenizer: Tokenizer, text: str) -> list[str | int]:
    """Control tokens stand for themselves; other tokens are text."""
    pieces: list[str | int] = []
    for piece in tokenizer.split_special(text, parse_special=True):
        shown = piece if isinstance(piece, str) or tokenizer.is_control(piece) else tokenizer.token_text(piece)
        if isinstance(shown, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += shown
        else:
            pieces.append(shown)
    return pieces
