"""Tests of stop strings and stop tokens in answers with thoughts: they end the answer, but not the thoughts."""

from __future__ import annotations

import random
import re
from typing import Any, cast

import pytest

from llamaclust.cluster.front.text.request import AnswerParsing
from llamaclust.cluster.front.text.stop_strings import AnswerStops, StopPattern
from llamaclust.cluster.front.text.thought_scanner import Part, thought_scanner
from llamaclust.model.chat.tools.answer_parser import parsed
from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS, KNOWN_FORMATS, KNOWN_REASONING
from llamaclust.model.chat.tools.tool_format import ChannelCalls, ReasoningTags, ToolFormat
from support.clusters.served import MODEL, ScriptedEngine, real_engine, says, tokenizer
from support.clusters.tool_chats import served
from support.seed import SEED


def known(mark: str) -> ToolFormat:
    found = next(known for known in KNOWN_FORMATS if mark in known.marks)
    return ToolFormat(found.calls, found.reasoning, found.dropped, found.calls_end_reasoning)


THINK = ToolFormat(GENERIC_CALLS, KNOWN_REASONING[0])
GEMMA, HARMONY, MUSE, KIMI = map(known, ("<|tool_call>", "<|channel|>", "<atem:function_calls>", "<|open|>"))
_ANALYSIS, _FINAL = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"
Case = tuple[ToolFormat, str, str, list[str], str, str | None]
"""A form, the prompt's beginning of the answer, the answer, stop strings, the text before the stop, and the stop."""
CASES: list[Case] = [
    (THINK, "", "<think>a X b</think>\n\nc X d", ["X"], "<think>a X b</think>\n\nc ", "X"),
    (THINK, "<think>\n", "a\n\nb</think>\n\nc\n\nd", ["\n\n"], "a\n\nb</think>\n\nc", "\n\n"),
    (THINK, "<think>\n</think>\n\n", "c think d", ["think"], "c ", "think"),
    (THINK, "", "\n<think>a</think>b<think>X", ["think"], "\n<think>a</think>b<", "think"),
    (THINK, "", "c <X", ["X"], "c <", "X"),
    (THINK, "", "<thin X", ["X"], "<thin ", "X"),
    (THINK, "", "<think>a X b", ["X"], "<think>a X b", None),
    (THINK, "", "<think>a</think>ab", ["abc", "ab"], "<think>a</think>", "ab"),
    (GEMMA, "", "c<|channel>thought X<channel|>d X", ["X"], "c<|channel>thought X<channel|>d ", "X"),
    (GEMMA, "", "<|channel>thought\nend<channel|>an end", ["end"], "<|channel>thought\nend<channel|>an ", "end"),
    (HARMONY, "", _ANALYSIS + "a X<|end|>" + _FINAL + "c X", ["X"], _ANALYSIS + "a X<|end|>" + _FINAL + "c ", "X"),
    (HARMONY, "", _ANALYSIS + "a<|end|>" + _FINAL + "a final", ["final"], None or "", "final"),
    (MUSE, "", " to=self<|message|>user<|eom|><|start|>assistant to=user<|message|>a user", ["user"], "", "user"),
    (KIMI, "", "<|open|>think<|sep|>a,b<|close|>think<|sep|>c,d", [","], "", ","),
    (HARMONY, "", "one X two", ["X"], "one ", "X"),
    (HARMONY, "", "one<|end|>two X", ["X"], "one<|end|>two ", "X"),
    (MUSE, "", "X", ["X"], "", "X"),
    (THINK, "", "</think> <think>X", ["X"], "</think> <think>X", None),
    (THINK, "", "</think> <think>X</think>cX", ["X"], "</think> <think>X</think>c", "X"),
    (KIMI, "", "<|open|>response<|sep|>a response", ["response"], "<|open|>response<|sep|>a ", "response"),
    (ToolFormat(None, ReasoningTags("[THINK]", ("[/THINK]",))), "", "[THINK]x[/THINK] [x]", ["]", "x"], "", "x"),
]


@pytest.mark.parametrize("case", CASES)
def test_stop_strings_end_the_answer_alone_however_the_text_comes(case: Case) -> None:
    form, begun, answer, stops, shown, stop = case
    shown = shown or answer[: answer.rindex(str(stop))]
    draw = random.Random(SEED)
    for most in (1, 2, 3, 7, len(answer)):
        search = AnswerStops([*map(StopPattern, stops)], thought_scanner(AnswerParsing(form, begun=begun)))
        text, rest = "", answer
        while rest:
            cut = draw.randint(1, most)
            text, rest = text + search.push(rest[:cut]), rest[cut:]
        assert (text + search.flush(), search.matched) == (shown, stop), most


def test_a_long_answer_without_a_header_is_not_held_back() -> None:
    search = AnswerStops([StopPattern("X")], thought_scanner(AnswerParsing(HARMONY)))
    assert len(search.push("a" * 5000)) > 4000 and search.push("bX") == "b" and search.matched == "X"


FORMS = [ToolFormat(each.calls, each.reasoning, each.dropped, each.calls_end_reasoning) for each in KNOWN_FORMATS]
FORMS = [form for form in FORMS if form.knows_reasoning]
FORMS += [ToolFormat(GENERIC_CALLS, tags) for tags in (*KNOWN_REASONING, ReasoningTags("<t>", ("</t>", "<u>"), True))]
TEXTS = ("X", "Y ", " ", "\n\n", "<", "X Y", "Z" * 70, "X\n")


def words_of(form: ToolFormat) -> list[str]:
    """Returns the texts of which answers consist: markers, beginnings of markers, headers and other texts."""
    if not isinstance(calls := form.calls, ChannelCalls):
        tags = form.reasoning
        assert tags is not None
        marks = (tags.begin, *tags.ends, *form.dropped)
        return [*marks, tags.begin, tags.end, *(mark[: len(mark) // 2] for mark in marks), *TEXTS]
    headers = (calls.reasoning_header, calls.content_header, "<|channel|>commentary to=web.X", "Y")
    ends = (*calls.message_ends, calls.message_begin)
    return [*ends, *(header + calls.header_end for header in headers), calls.header_end, ends[0][:2], *headers, *TEXTS]


def is_call(form: ToolFormat, text: str) -> bool:
    """Returns True if `text` may have a call of a form with headers. The parser does not report a begun call."""
    calls = form.calls
    return isinstance(calls, ChannelCalls) and calls.header_end != "\n" and bool(re.search(calls.recipient, text))


def letters(text: str) -> str:
    return re.sub("[^XYZ]", "", text)


@pytest.mark.parametrize("form", FORMS)
def test_stops_are_searched_in_just_the_text_that_the_parser_shows(form: ToolFormat) -> None:
    draw, words = random.Random(SEED), words_of(form)
    for _ in range(1500):
        begun = "".join(draw.choices(words, k=draw.choice([0, 0, 1, 3])))
        answer = "".join(draw.choices(words, k=draw.randint(1, 9)))
        reading = AnswerParsing(form, begun=begun)
        scanner, shown = thought_scanner(reading), parsed(reading.parser(), answer)
        if is_call(form, begun + answer) or shown.calls:
            continue  # The search reads calls too.
        rest, parts = answer, list[Part]()
        while rest:
            cut = draw.randint(1, 9)
            parts, rest = parts + scanner.feed(rest[:cut]), rest[cut:]
        parts += scanner.flush()
        assert "".join(text for text, _ in parts) == answer, begun
        searched = "".join(text for text, is_answer in parts if is_answer)
        assert letters(shown.content).endswith(letters(searched)), (begun, answer)
        assert begun or letters(shown.content) == letters(searched), answer


CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 90}
ANSWER = "<think>One. Two.</think>\n\nThree. Four."
STOPPED = [
    ("/v1/chat/completions", CHAT | {"stop": ["."]}),
    ("/v1/chat/completions", CHAT | {"stop_token_ids": [tokenizer().encode(".", add_special=False)[-1]]}),
    ("/v1/messages", CHAT | {"stop_sequences": ["."]}),
    ("/v1/responses", {"model": MODEL, "input": "Hi", "stop": "."}),
    ("/api/chat", {"model": MODEL, "messages": CHAT["messages"], "options": {"stop": ["."]}}),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), STOPPED)
async def test_stops_of_every_api(path: str, body: dict[str, Any], stream: bool) -> None:
    async with served(ScriptedEngine(says(ANSWER))) as http:
        reply = await http.post(path, json=body | {"stream": stream})
    assert reply.status_code == 200 and "x-llamaclust-ignored" not in reply.headers, reply.text
    texts = re.findall(r'"(?:content|reasoning_content|thinking|text|delta)": ?"([^"]*)"', reply.text)
    shown = "".join(texts)
    assert "One" in shown and "Two" in shown and "Three" in shown and "F" not in shown


@pytest.mark.parametrize(
    "fields", [{"stop": ["."]}, {"stop_token_ids": [tokenizer().encode(".", add_special=False)[-1]]}]
)
async def test_content_and_finish_reason(fields: dict[str, Any]) -> None:
    async with served(ScriptedEngine(says(ANSWER))) as http:
        choice = (await http.post("/v1/chat/completions", json=CHAT | fields)).json()["choices"][0]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("One. Two.", "Three")
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("text", [".", "Four", "Three"])
@pytest.mark.parametrize("least", [0, 1, 40])
async def test_min_tokens_delay_stop_tokens_of_chats_with_thoughts(text: str, least: int) -> None:
    first, last = tokenizer().encode(text, add_special=False)[0], tokenizer().end_of_generation
    engine = ScriptedEngine(says(ANSWER))
    async with real_engine() as (real, _), served(engine) as scripted, served(cast(ScriptedEngine, real)) as http:
        body = CHAT | {"stop_token_ids": [first], "min_tokens": least}
        assert (await scripted.post("/v1/chat/completions", json=body)).status_code == 200
        reply = await http.post("/v1/chat/completions", json=body | {"temperature": 1, "logprobs": True})
    (generation,) = engine.submitted
    assert (generation.stop_token_ids, generation.late_token_ids) == (last, frozenset({first}))
    assert generation.delayed_ids == tuple(sorted({first} | last)) and generation.min_tokens == least
    entries = reply.json()["choices"][0]["logprobs"]["content"]
    assert len(entries) >= least and all(entry["id"] not in generation.delayed_ids for entry in entries[:least])


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
async def test_prompts_without_a_chat_end_at_the_first_stop_string(path: str) -> None:
    async with served(ScriptedEngine(says(ANSWER))) as http:
        reply = (await http.post(path, json={"prompt": "Hi", "stop": ["."], "max_tokens": 90})).json()
    assert (reply["choices"][0]["text"] if path == "/v1/completions" else reply["content"]) == "<think>One"
