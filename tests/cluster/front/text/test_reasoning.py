"""Tests of the reasoning that the last stage follows: tags of formats, beginnings in the prompt, later grammars."""

from __future__ import annotations

import pytest

from llamaclust.cluster.front.text.chat import answer_reasoning
from llamaclust.cluster.front.text.request import AnswerParsing, ReasoningBudget
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler.matchers import Grammar, Reasoning
from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS, KNOWN_FORMATS
from llamaclust.model.chat.tools.tool_format import ReasoningTags, ToolFormat
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.models.tiny_tokenizers import byte_level

TOKENIZER = load_tokenizer(byte_level(330))
THINK = ToolFormat(GENERIC_CALLS, ReasoningTags("<think>", ("</think>",)))
TOOLS = {"f": {"type": "object"}}
OWN, LAZY = Grammar("x"), Grammar("x", ("<tool_call>",))


def known(mark: str) -> ToolFormat:
    found = next(known for known in KNOWN_FORMATS if mark in known.marks)
    return ToolFormat(found.calls, found.reasoning, found.dropped, found.calls_end_reasoning)


def reasoning(
    form: ToolFormat = THINK, begun: str = "", budget: ReasoningBudget | None = None, grammar: Grammar | None = None
) -> Reasoning | None:
    return answer_reasoning(AnswerParsing(form, TOOLS, begun=begun), budget, grammar, TOKENIZER)


@pytest.mark.parametrize("begun", ["", "<think>\n", "<think>a</think>\n\n"])
def test_a_budget_of_an_answer_that_may_reason(begun: str) -> None:
    found = reasoning(begun=begun, budget=ReasoningBudget(5, " Well."))
    assert found is not None and (found.begins, found.ends, found.budget) == (("<think>",), ("</think>",), 5)
    assert found.is_open == (begun == "<think>\n") and not found.delays_grammar
    assert TOKENIZER.decode(found.forced) == " Well.</think>"


def test_control_words_of_the_end_are_tokens_and_those_of_the_message_are_text() -> None:
    form = ToolFormat(None, ReasoningTags("<|im_start|>", ("<|im_end|>",)))
    found = reasoning(form, budget=ReasoningBudget(1, "<|im_start|>"))
    assert found is not None
    end = TOKENIZER.token_id("<|im_end|>")
    assert found.forced[-1] == end and found.forced.count(TOKENIZER.token_id("<|im_start|>") or 0) == 0


def test_there_is_none_to_follow() -> None:
    budget = ReasoningBudget(5)
    assert answer_reasoning(None, budget, None, TOKENIZER) is None
    assert reasoning(ToolFormat(GENERIC_CALLS), budget=budget) is None, "the format knows no reasoning"
    assert reasoning(begun="So", budget=budget) is None, "the content has begun"
    assert reasoning(begun="<think>\n") is None, "without a budget or a grammar"
    assert reasoning(ToolFormat(None, ReasoningTags("b" * 1025, ("e",))), budget=budget) is None


@pytest.mark.parametrize(
    ("begun", "grammar", "delays"),
    [
        ("<think>\n", OWN, True),
        ("", OWN, False),
        ("<think>\n", LAZY, True),
        ("", LAZY, True),
        ("<think>\n", None, False),
    ],
)
def test_reasoning_delays_the_grammar_of_the_content(begun: str, grammar: Grammar | None, delays: bool) -> None:
    found = reasoning(begun=begun, grammar=grammar)
    assert (found is not None and found.delays_grammar and found.budget is None) == delays
    found = reasoning(begun=begun, grammar=grammar, budget=ReasoningBudget(1 << 60))
    assert found is not None and (found.delays_grammar, found.budget) == (delays, MAX_CONTEXT_TOKENS)


def test_channels() -> None:
    found = reasoning(known("<|channel|>"), budget=ReasoningBudget(5))
    assert found is not None and found.repeats and not found.is_open
    assert found.begins == ("<|channel|>analysis<|message|>",) and TOKENIZER.decode(found.forced) == "<|end|>"
    assert reasoning(known(">>>all"), budget=ReasoningBudget(5)) is None, "its channels have no reasoning"


def test_calls_that_end_the_reasoning() -> None:
    found = reasoning(known("<|tool_calls_section_begin|>"), "<think>", ReasoningBudget(5), LAZY)
    assert found is not None and found.ends[:2] == ("</think>", "<|tool_calls_section_begin|>")
    assert not found.delays_grammar, "its trigger may stand in the reasoning"


def test_a_message_with_the_end_is_refused() -> None:
    with pytest.raises(ParameterError, match="has the tag that ends the reasoning"):
        reasoning(budget=ReasoningBudget(5, "So</think>"))
