"""Tests of the parser of answers with reasoning and calls: whole, in pieces, and hostile."""

from __future__ import annotations

import json
import random
import time

import pytest

from llamaclust.model.chat.tools.answer_parser import AnswerParser, parsed
from llamaclust.model.chat.tools.events import AnswerEvent, ArgumentText, CallBegun, CallEnded, ParsedAnswer, merged
from support.chat.sample_answers import SAMPLES, TOOLS, Sample
from support.chat.sample_templates import form_of
from support.seed import SEED

FORMS = sorted({sample.form for sample in SAMPLES})
CHUNKINGS = 40
"""Number of random divisions of each sample."""


def parser_of(sample: Sample) -> AnswerParser:
    return AnswerParser(form_of(sample.form), TOOLS)


def meaning(answer: ParsedAnswer) -> tuple[str, str, tuple[tuple[str, str, str], ...]]:
    calls = tuple((call.name, call.arguments, call.call_id) for call in answer.calls)
    return answer.reasoning, answer.content, calls


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.form}-{SAMPLES.index(sample)}")
def test_sample(sample: Sample) -> None:
    answer = parsed(parser_of(sample), sample.text)
    assert meaning(answer) == (sample.reasoning, sample.content, sample.calls)
    for call in answer.calls:
        json.loads(call.arguments)


@pytest.mark.parametrize("form", FORMS)
def test_events_do_not_depend_on_pieces(form: str) -> None:
    draw = random.Random(SEED)
    samples = [sample for sample in SAMPLES if sample.form == form]
    for sample in samples:
        whole = events_of(AnswerParser(form_of(form), TOOLS), [sample.text])
        for _ in range(CHUNKINGS):
            pieces = random_pieces(draw, sample.text)
            assert events_of(AnswerParser(form_of(form), TOOLS), pieces) == whole, (SEED, pieces)


def test_calls_are_streamed() -> None:
    """Checks that name and arguments are emitted before the call is complete."""
    parser = AnswerParser(form_of("coder"), TOOLS)
    head = parser.feed("<tool_call>\n<function=run>\n<parameter=code>\n")
    assert head == [CallBegun(0, "run"), ArgumentText(0, '{"code": "')]
    assert parser.feed('a = "1"\nb = 2') == [ArgumentText(0, 'a = \\"1\\"\\nb = ')]
    rest = merged(parser.feed("\n</parameter>\n</function>\n</tool_call>") + parser.end())
    assert rest == [ArgumentText(0, '2"}'), CallEnded(0)]


EMPTY = {
    "harmony": "<|channel|>commentary to=functions.run <|constrain|>json<|message|>",
    "devstral": "[TOOL_CALLS]run[ARGS]",
}


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("form", EMPTY)
def test_a_call_without_arguments_has_an_empty_object_unless_it_was_cut(form: str, is_cut: bool) -> None:
    parser = AnswerParser(form_of(form), TOOLS)
    events = parser.feed(EMPTY[form]) + parser.end(is_cut=is_cut)
    arguments = [] if is_cut else [ArgumentText(0, "{}")]
    assert events == [CallBegun(0, "run"), *arguments, CallEnded(0, is_cut=is_cut)]


def test_the_text_of_a_call_that_is_not_json_is_its_arguments() -> None:
    parser = AnswerParser(form_of("harmony"), TOOLS)
    events = parser.feed("<|channel|>commentary to=functions.run <|message|>print(1)") + parser.end()
    text = "".join(event.text for event in events if isinstance(event, ArgumentText))
    assert text == "print(1)" and events[-1] == CallEnded(0)


def test_without_tools_nothing_is_a_call() -> None:
    text = '<tool_call>\n{"name": "run", "arguments": {}}\n</tool_call>'
    assert parsed(AnswerParser(form_of("hermes"), {}), text).content == text


def test_calls_beyond_the_limit_are_left_out() -> None:
    call = '<tool_call>\n{"name": "run", "arguments": {}}\n</tool_call>\n'
    answer = parsed(AnswerParser(form_of("hermes"), TOOLS, most_calls=1), call * 3)
    assert len(answer.calls) == 1 and answer.content == ""


@pytest.mark.parametrize("piece", ["<", "\n<tool", "<tool_call>", '<tool_call>\n{"na'])
def test_a_piece_of_a_further_call_is_no_content(piece: str) -> None:
    call = '<tool_call>\n{"name": "run", "arguments": {}}\n</tool_call>'
    answer = parsed(AnswerParser(form_of("hermes"), TOOLS), call + piece)
    assert len(answer.calls) == 1 and answer.content == ""
    assert parsed(AnswerParser(form_of("hermes"), TOOLS), f"{call}So 1 <").content == "So 1 <"
    assert parsed(AnswerParser(form_of("hermes"), TOOLS), piece[:5]).content == piece[:5]


def test_reasoning_may_stay_in_the_content() -> None:
    text = "<think>\nHm.\n</think>\n\nYes."
    assert parsed(AnswerParser(form_of("hermes"), {}, splits_reasoning=False), text).content == text


def test_reasoning_that_the_prompt_opened() -> None:
    answer = parsed(AnswerParser(form_of("hermes"), {}, begun="<think>\n"), "Hm.\n</think>\n\nYes.")
    assert (answer.reasoning, answer.content) == ("Hm.", "Yes.")


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_read_on_from_any_place(form: str) -> None:
    """Checks that calls are numbered from 0, and that a call begun in the prompt keeps the arguments begun there."""
    for sample in SAMPLES:
        if sample.form != form:
            continue
        whole = parsed(AnswerParser(form_of(form), TOOLS), sample.text)
        for at in range(len(sample.text) + 1):
            answer = parsed(AnswerParser(form_of(form), TOOLS, begun=sample.text[:at]), sample.text[at:])
            calls = len(answer.calls)
            assert answer.calls == whole.calls[len(whole.calls) - calls :], (form, at)
            assert answer.content in whole.content + sample.text and whole.reasoning.endswith(answer.reasoning)


def test_truncated_call_is_what_there_is() -> None:
    answer = parsed(AnswerParser(form_of("hermes"), TOOLS), '<tool_call>\n{"name": "run", "arguments": {"code": "pr')
    assert meaning(answer) == ("", "", (("run", '{"code": "pr', ""),))


@pytest.mark.parametrize("form", ["harmony", "muse", "functionary"])
@pytest.mark.parametrize("text", ['{"city": "Paris"}', "Hi", '{"route": "to=functions.run"}', "Hi.\nIt is <|x|>."])
def test_content_without_a_header(form: str, text: str) -> None:
    """A grammar may force content from the first token on."""
    end = {"harmony": "<|end|><|start|>assistant<|channel|>final<|message|>", "muse": "<|eot|>", "functionary": ">>>"}
    for pieces in ([text], [*text], [text, end[form]]):
        answer = ParsedAnswer()
        answer.add(events_of(AnswerParser(form_of(form), TOOLS), pieces))
        assert meaning(answer) == ("", text, ()), pieces


@pytest.mark.parametrize(
    ("form", "header"),
    [
        ("harmony", "<|chan"),
        ("harmony", "<|channel|>final"),
        ("muse", " to=us"),
        ("muse", " to"),
        ("functionary", "all"),
    ],
)
def test_a_header_that_the_token_limit_cut_is_no_content(form: str, header: str) -> None:
    assert meaning(parsed(AnswerParser(form_of(form), TOOLS), header)) == ("", "", ())


@pytest.mark.parametrize("form", FORMS)
def test_hostile_answers(form: str) -> None:
    """Checks that damaged answers are parsed, and that the output's size is bounded by the input's."""
    draw = random.Random(SEED)
    texts = [sample.text for sample in SAMPLES if sample.form == form]
    marks = [text[at : at + draw.randrange(1, 30)] for text in texts for at in range(0, len(text), 7)]
    for _ in range(40):
        pieces = [draw.choice([*marks, "{", "[", '"', "\\", "<", "\n", "\ud800", "é", ":", "}" * 9]) for _ in range(60)]
        answer = ParsedAnswer()
        answer.add(events_of(AnswerParser(form_of(form), TOOLS), pieces))
        size = sum(len(call.arguments) for call in answer.calls) + len(answer.content) + len(answer.reasoning)
        assert size <= 7 * len("".join(pieces)) + 1000, (SEED, pieces)


@pytest.mark.parametrize("form", FORMS)
def test_long_answers_take_linear_time(form: str) -> None:
    sample = next(sample for sample in SAMPLES if sample.form == form)
    unit = sample.text + "{" * 50 + '["' * 50 + "<" * 50
    parser = AnswerParser(form_of(form), TOOLS)
    start = time.process_time()
    for _ in range(400):
        parser.feed(unit)
    parser.end()
    assert time.process_time() - start < 60


def test_many_events_and_long_words_take_linear_time() -> None:
    start = time.process_time()
    events = merged([CallBegun(0, "run"), *(ArgumentText(0, character) for character in "[]" * 300_000)])
    assert events == [CallBegun(0, "run"), ArgumentText(0, "[]" * 300_000)]
    parsed(AnswerParser(form_of("gemma"), TOOLS), "<|tool_call>call:run{" + "a" * 100_000)
    assert time.process_time() - start < 60


def events_of(parser: AnswerParser, pieces: list[str]) -> list[AnswerEvent]:
    return merged([*(event for piece in pieces for event in parser.feed(piece)), *parser.end()])


def random_pieces(draw: random.Random, text: str) -> list[str]:
    cuts = sorted(draw.sample(range(len(text) + 1), draw.randint(0, min(len(text), 40))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
