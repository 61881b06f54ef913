"""Tests of stop strings and stop tokens in answers with thoughts: they end the answer, but not the thoughts."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from llamaclust.cluster.front.text.request import AnswerParsing
from llamaclust.cluster.front.text.stop_strings import AnswerStops, StopPattern
from llamaclust.cluster.front.text.thought_scanner import thought_scanner
from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS, KNOWN_FORMATS, KNOWN_REASONING
from llamaclust.model.chat.tools.tool_format import ReasoningTags, ToolFormat
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
    async with real_engine() as (real, _), served(engine) as scripted, served(real) as http:
        body = CHAT | {"stop_token_ids": [first], "min_tokens": least}
        assert (await scripted.post("/v1/chat/completions", json=body)).status_code == 200
        reply = await http.post("/v1/chat/completions", json=body | {"temperature": 1, "logprobs": True})
    (generation,) = engine.submitted
    assert (generation.stop_token_ids, generation.late_token_ids) == (last, {first})
    assert generation.delayed_ids == tuple(sorted({first} | last)) and generation.min_tokens == least
    entries = reply.json()["choices"][0]["logprobs"]["content"]
    assert len(entries) >= least and all(entry["id"] not in generation.delayed_ids for entry in entries[:least])


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
async def test_prompts_without_a_chat_end_at_the_first_stop_string(path: str) -> None:
    async with served(ScriptedEngine(says(ANSWER))) as http:
        reply = (await http.post(path, json={"prompt": "Hi", "stop": ["."], "max_tokens": 90})).json()
    assert (reply["choices"][0]["text"] if path == "/v1/completions" else reply["content"]) == "<think>One"
