"""Tests of answers that consist of calls without the markers of the model's format."""

from __future__ import annotations

from random import Random

import pytest

from llamaclust.model.chat.tools.answer_parser import AnswerParser, parsed
from llamaclust.model.chat.tools.events import AnswerEvent, ParsedAnswer, ToolCall
from support.chat.sample_templates import form_of
from support.seed import SEED

TOOLS = {"add": {"type": "object"}, "get_weather": {"type": "object"}}
FORMS = ("hermes", "coder", "glm", "mistral", "devstral", "deepseek", "llama", "lfm2")
ADD = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
WEATHER = '{"parameters": {"city": "Rom"}, "name": "get_weather"}'
A, W = ToolCall("add", "", '{"a": 1, "b": [2]}'), ToolCall("get_weather", "", '{"city": "Rom"}')

CALLS = {
    ADD: [A],
    f" \n{ADD}\n": [A],
    f"```json\n{ADD}\n```": [A],
    f"```\n{WEATHER}\n```\n": [W],
    f"```tool_call\n{ADD}\n{WEATHER}```": [A, W],
    f"[{ADD}, {WEATHER}]": [A, W],
    f"{ADD}\n{ADD}": [A, A],
    '{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}': [ToolCall("add", "", '{"a": 1}')],
    '{"id": "c1", "name": "add", "arguments": {}}': [ToolCall("add", "c1", "{}")],
}
TEXTS = (
    '{"name": "Alice", "arguments": {"a": 1}}',
    '{"name": "addition", "arguments": {}}',
    '{"name": "add", "age": 3}',
    '{"city": "Rom", "days": [1, 2]}',
    f"Here is the call:\n{ADD}",
    f"{ADD}\nThat is it.",
    f"```json\n{ADD}\n```\nThis adds.",
    f"```python\nprint({ADD})\n```",
    f"[{ADD}, 3]",
    '{"name": "add", "arguments": {"a": 1',
    '{"name": "add", "arguments": [1]}',
    '{"name": "add"}',
    "[1, 2]",
    "{}",
    "```",
    "```json\n[]\n```",
)


def parser(form: str, begun: str = "", *, reads_unmarked: bool = True, most_calls: int | None = None) -> AnswerParser:
    return AnswerParser(form_of(form), TOOLS, begun=begun, reads_unmarked=reads_unmarked, most_calls=most_calls)


def in_pieces(form: str, text: str, source: Random) -> ParsedAnswer:
    made, answer = parser(form), ParsedAnswer()
    while text:
        length = source.randrange(1, 6)
        answer.add(made.feed(text[:length]))
        text = text[length:]
    answer.add(made.end())
    return answer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", CALLS)
def test_an_answer_that_is_calls_has_these_calls(form: str, text: str) -> None:
    if form == "llama" and not text.startswith("`"):
        pytest.skip("this form has no markers: calls stand at the beginning of any answer")
    if form == "lfm2" and text.startswith("["):
        pytest.skip("a list is a call of this form's own notation")
    for answer in (parsed(parser(form), text), in_pieces(form, text, Random(SEED))):
        assert (answer.calls, answer.content.strip()) == (CALLS[text], "")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "llama"])
@pytest.mark.parametrize("text", TEXTS)
def test_any_other_answer_is_text_to_the_letter(form: str, text: str) -> None:
    plain = parsed(parser(form, reads_unmarked=False), text)
    for answer in (parsed(parser(form), text), in_pieces(form, text, Random(SEED))):
        assert answer == plain
    assert plain.content == text or form == "lfm2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"name": "A', '{"name": "A'),
        ('{"ti', '{"ti'),
        ("```python\nx", "```python\nx"),
        ('```json\n{"name": "add", "arguments": {}}\n```\nT', '```json\n{"name": "add", "arguments": {}}\n```\nT'),
        ("[1", "[1"),
        ('{"name": "ad', ""),
        ("``", ""),
        ("```json\n{", ""),
    ],
)
def test_text_is_shown_as_soon_as_it_is_no_call(text: str, shown: str) -> None:
    events: list[AnswerEvent] = parser("hermes").feed(text)
    answer = ParsedAnswer()
    answer.add(events)
    assert answer.content == shown


def test_calls_behind_reasoning_and_before_what_closes_the_answer() -> None:
    answer = parsed(parser("hermes"), f"<think>So.</think>\n\n{ADD}")
    assert (answer.reasoning, answer.content, answer.calls) == ("So.", "", [A])
    opened = parsed(parser("hermes", "<think>\n"), f"So.</think>\n```json\n{ADD}\n```")
    assert (opened.reasoning.strip(), opened.calls) == ("So.", [A])


def test_calls_beyond_the_most_are_left_out() -> None:
    answer = parsed(parser("hermes", most_calls=1), f"[{ADD}, {WEATHER}]")
    assert answer.calls == [A]


def test_marked_calls_are_read_as_before() -> None:
    answer = parsed(parser("hermes"), f"<tool_call>\n{ADD}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>")
    assert [call.name for call in answer.calls] == ["add", "get_weather"] and answer.content == ""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('"Rom", 2', '{"city": "Rom", "days": 2}'),
        ('days=2, "Rom"', '{"days": 2, "city": "Rom"}'),
        ("Rom, days = None", '{"city": "Rom", "days": null}'),
        ("days=", '{"days": null}'),
        ('"a, b)", [1, (2)], {"c": "]"}', '{"city": "a, b)", "days": [1, 2], "argument_3": {"c": "]"}}'),
        ("city=a}b, days=[2]]", '{"city": "a}b", "days": "[2]]"}'),
        ('user-id="x", -1.5', '{"user-id": "x", "city": -1.5}'),
        ("", "{}"),
    ],
)
def test_positional_arguments_have_the_names_of_parameters(arguments: str, wanted: str) -> None:
    tools = {"look": {"type": "object", "properties": {"city": {}, "days": {}}}}
    text = f"<|tool_call_start|>[look({arguments}), look(city=1)]<|tool_call_end|>"
    for pieces in ([text], text):
        made, answer = AnswerParser(form_of("lfm2"), tools), ParsedAnswer()
        for piece in pieces:
            answer.add(made.feed(piece))
        answer.add(made.end())
        assert [call.arguments for call in answer.calls] == [wanted, '{"city": 1}']
