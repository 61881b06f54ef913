"""What becomes of a chat whose calls' grammar is refused, or could not be checked in time."""

from __future__ import annotations

import pytest

from llamaclust.cluster.text import call_constraint as module
from llamaclust.cluster.text.chat import ChatRequest
from llamaclust.cluster.text.chat_format import AnswerReading
from llamaclust.core.errors import DeadlineError
from llamaclust.model.chat.tools.constraint.call_grammar import CallGrammar
from llamaclust.model.chat.tools.tool_format import ToolFormat
from llamaclust.model.grammars.checker import GrammarChecker
from llamaclust.model.grammars.checker_process import CheckLimits
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.models.tiny_tokenizers import byte_level


async def test_only_a_refusal_leaves_calls_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that the machine was too slow for must not change the tokens of an answer."""
    tokenizer = load_tokenizer(byte_level(330))
    reading = AnswerReading(ToolFormat(), {"f": {"type": "object"}})
    refusing, late = GrammarChecker(tokenizer), GrammarChecker(tokenizer, CheckLimits(wall_s=0.0))
    monkeypatch.setattr(module, "call_grammar", lambda *_, **__: CallGrammar("start: nothing"))
    try:
        assert await module.answer_grammar(ChatRequest(()), reading, tokenizer, refusing) is None
        with pytest.raises(DeadlineError):
            await module.answer_grammar(ChatRequest(()), reading, tokenizer, late)
    finally:
        refusing.close()
        late.close()
