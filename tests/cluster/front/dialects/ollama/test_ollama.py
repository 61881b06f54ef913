"""Tests of Ollama's endpoints that generate: lines of JSON, whole replies, options, tools and reasoning."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.body import HEADER
from llamaclust.core.errors import WorkerError
from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import CONTEXT, END, MODEL, ScriptedEngine, client, ids, make_app, says, tokenizer
from support.several_models.api_models import ScriptedLifecycle

ANSWER = "The cat 🦙."
HI = [{"role": "user", "content": "Hi"}]
THINKING = (
    "{% for t in tools or [] %}+{{ t.function.name }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}{% endfor %}'
    "{% if add_generation_prompt %}<assistant>{{ reasoning_effort or '' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "look", "arguments": {"city": "Rom"}}</tool_call>'


async def post(path: str, body: Any, engine: ScriptedEngine | None = None, **settings: Any) -> httpx.Response:
    async with client(make_app(engine or ScriptedEngine(says(ANSWER)), **settings)) as http:
        return await http.post(path, json=body)


async def generate(engine: ScriptedEngine | None = None, **fields: Any) -> Any:
    """Returns the whole reply."""
    body = {"model": MODEL, "prompt": "Hello", "stream": False} | fields
    reply = await post("/api/generate", body, engine)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def chat(answer: str, template: str = THINKING, **fields: Any) -> tuple[list[Any], str]:
    """Returns the lines of the reply and the engine's prompt."""
    engine = ScriptedEngine(says(answer))
    with ChatTemplate(template, "", "") as made:
        async with client(make_app(engine, made)) as http:
            reply = await http.post("/api/chat", json={"model": MODEL, "messages": HI} | fields)
    assert reply.status_code == 200, reply.text
    return lines_of(reply), tokenizer().decode(engine.submitted[0].prompt)


def lines_of(reply: httpx.Response) -> list[Any]:
    return [json.loads(text) for text in reply.text.splitlines()]


def error_of(reply: httpx.Response) -> tuple[int, str]:
    """Returns the status and the error, which is only a text in Ollama's API."""
    fields = reply.json()
    assert fields.keys() == {"error"}
    return reply.status_code, fields["error"]


async def test_generate_streams_lines_by_default() -> None:
    engine = ScriptedEngine(says(ANSWER))
    reply = await post("/api/generate", {"model": MODEL, "prompt": "Hello"}, engine)
    assert reply.headers["content-type"] == "application/x-ndjson"
    *parts, last = lines_of(reply)
    assert "".join(part["response"] for part in parts) == ANSWER and last["response"] == ""
    assert all(part["done"] is False and part["model"] == MODEL for part in parts)
    assert (last["done"], last["done_reason"]) == (True, "stop")
    prompt = engine.submitted[0].prompt
    assert tokenizer().decode(prompt).endswith("<|im_start|>assistant\n")
    assert last["context"] == [*prompt, *ids(ANSWER), END]
    assert engine.running == 0


async def test_generate_whole() -> None:
    reply = await generate(options={"num_predict": 3})
    assert (reply["response"], reply["done"], reply["done_reason"]) == ("The", True, "length")
    assert reply["created_at"].endswith("Z") and reply["prompt_eval_count"] == len(reply["context"]) - 3
    assert (reply["eval_count"], reply["eval_duration"]) == (3, 40_000_000)  # two more tokens at 50 a second
    assert (reply["load_duration"], reply["total_duration"]) == (1_500_000, 60_000_000)
    assert reply["prompt_eval_duration"] == (reply["prompt_eval_count"] - 3) * 10_000_000  # 3 are cached


async def test_a_raw_prompt_is_not_rendered() -> None:
    engine = ScriptedEngine(says("a"))
    reply = await generate(engine, raw=True)
    assert engine.submitted[0].prompt == tuple(ids("Hello")) and "context" not in reply
    body = {"model": MODEL, "prompt": "Hello", "raw": True, "system": "Be brief."}
    status, message = error_of(await post("/api/generate", body))
    assert status == 400 and message.startswith("system: cannot be used together with raw")


async def test_a_system_message_and_an_earlier_context_stand_before_the_prompt() -> None:
    engine = ScriptedEngine(says("b"))
    await generate(engine, system="Be brief.")
    assert "system\nBe brief.<|im_end|>" in tokenizer().decode(engine.submitted[0].prompt)
    first = await generate(engine, prompt="a")
    await generate(engine, prompt="c", context=first["context"])
    earlier = engine.submitted[-1].prompt
    assert list(earlier[: len(first["context"])]) == first["context"]
    assert "c" in tokenizer().decode(earlier[len(first["context"]) :])
    await generate(engine, prompt="d", raw=True, context=first["context"])
    assert engine.submitted[-1].prompt == (*first["context"], *ids("d"))


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_without_a_prompt_loads(path: str, stream: bool) -> None:
    engine = ScriptedEngine(says("a"))
    reply = await post(path, {"model": MODEL, "stream": stream, "keep_alive": "5m"}, engine)
    (line,) = lines_of(reply)
    assert (line["done"], line["done_reason"]) == (True, "load") and reply.headers[HEADER] == "keep_alive"
    assert not engine.submitted


@pytest.mark.parametrize("stream", [True, False])
async def test_a_load_that_fails_is_an_error_and_an_unload_loads_nothing(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(lifecycle: ScriptedLifecycle) -> None:
        raise WorkerError("no plan could be loaded")

    monkeypatch.setattr(ScriptedLifecycle, "preload", fail)
    body = {"model": MODEL, "stream": stream}
    assert error_of(await post("/api/generate", body, can_unload=True)) == (503, "no plan could be loaded")
    (line,) = lines_of(await post("/api/generate", body | {"keep_alive": 0}, can_unload=True))
    assert line["done_reason"] == "unload"


async def test_options_have_the_defaults_and_meaning_of_ollama() -> None:
    engine = ScriptedEngine(says("a"))
    await generate(engine)
    params, request = engine.submitted[0].params, engine.submitted[0]
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.9, 0.0)
    assert (params.repetition_penalty, request.penalty_window) == (1.1, 64)
    assert request.max_new_tokens == CONTEXT - len(request.prompt)
    given = {"temperature": 0, "top_k": -1, "seed": 7, "stop": ["x"], "repeat_last_n": -1, "num_predict": 0}
    await generate(engine, options=given)
    request = engine.submitted[1]
    assert (request.params.temperature, request.params.top_k, request.seed) == (0, 0, 7)
    assert request.penalty_window == CONTEXT and request.max_new_tokens == CONTEXT - len(request.prompt)
    assert (await generate(engine, options={"mirostat": 2}))["done"]
    assert engine.submitted[2].params.chain is not None


async def test_defaults_of_the_cluster_file_are_options() -> None:
    engine = ScriptedEngine(says("a"))
    defaults = {"temperature": 0.3, "max_tokens": 5, "repetition_penalty": 1.5, "logprobs": True}
    for options in (None, {"temperature": 0.5, "num_predict": 7}):
        body = {"model": MODEL, "prompt": "a", "stream": False, "options": options}
        assert (await post("/api/generate", body, engine, defaults=defaults)).status_code == 200
    first, second = engine.submitted
    assert (first.params.temperature, first.params.repetition_penalty, first.max_new_tokens) == (0.3, 1.5, 5)
    assert (second.params.temperature, second.max_new_tokens) == (0.5, 7)
    reply = await post("/api/generate", {"model": MODEL, "prompt": "a", "options": [1]}, defaults=defaults)
    assert error_of(reply)[0] == 400


async def test_options_without_effect_are_named() -> None:
    options = {"num_ctx": 4096, "num_thread": 8, "use_mmap": True, "wrong": 1}
    body = {"model": MODEL, "prompt": "a", "stream": False, "options": options}
    reply = await post("/api/generate", body)
    assert reply.headers[HEADER].split(", ") == ["num_ctx", "wrong"]
    status, message = error_of(await post("/api/generate", body, is_strict=True))
    assert status == 400 and "num_ctx" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "}"),
        ("template", "{{ .Prompt }}"),
        ("response_format", {"type": "json_object"}),
        ("options", {"logit_bias": {"5": 1}}),
        ("format", "yaml"),
        ("think", "much"),
        ("think", True),  # the model has no reasoning
        ("options", {"top_k": "many"}),
        ("options", {"temperature": -1}),
        ("options", {"rope_frequency_base": 1e6}),
        ("context", [10**6]),
        ("top_logprobs", 3),
        ("model", 5),
    ],
)
async def test_refusals_name_the_field_in_the_shape_of_ollama(field: str, value: Any) -> None:
    status, message = error_of(await post("/api/generate", {"model": MODEL, "prompt": "a"} | {field: value}))
    names = {"options": next(iter(value)) if isinstance(value, dict) else "", "context": "prompt"}
    assert status == 400 and names.get(field, field) in message


async def test_refused_messages() -> None:
    for message, named in (
        ({"role": "judge", "content": "a"}, "role"),
        ({"role": "user", "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls"),
        ("Hi", "object"),
    ):
        status, text = error_of(await post("/api/chat", {"model": MODEL, "messages": [message]}))
        assert status == 400 and "messages[0]" in text and named in text


async def test_an_error_in_a_stream_is_its_last_line() -> None:
    engine = ScriptedEngine(says(ANSWER), failure=WorkerError("a worker was lost"), failure_after=2)
    *parts, last = lines_of(await post("/api/generate", {"model": MODEL, "prompt": "a"}, engine))
    assert [part["response"] for part in parts] == ["T", "h"]
    assert last == {"error": "a worker was lost"}


async def test_a_named_reply_is_sent_again_line_by_line() -> None:
    async with client(make_app(ScriptedEngine(says(ANSWER)))) as http:
        body, key = {"model": MODEL, "prompt": "a"}, {"Idempotency-Key": "k"}
        first = await http.post("/api/generate", json=body, headers=key)
        again = await http.post("/api/generate", json=body, headers=key)
        rest = await http.get("/v1/streams/k?after=2")
    assert again.text == first.text and again.headers["content-type"] == "application/x-ndjson"
    assert rest.text.splitlines() == first.text.splitlines()[2:]


async def test_another_model_is_refused_where_names_are_strict() -> None:
    body = {"model": "llama3.2", "prompt": "a", "stream": False}
    assert (await post("/api/generate", body)).json()["model"] == MODEL
    status, message = error_of(await post("/api/generate", body, strict_model=True))
    assert status == 404 and "llama3.2" in message
    tagged = body | {"model": f"{MODEL}:latest"}
    assert (await post("/api/generate", tagged, strict_model=True)).status_code == 200


async def test_chat_lines() -> None:
    (*parts, last), prompt = await chat(ANSWER)
    assert prompt == "<user>Hi<assistant>"
    assert "".join(part["message"]["content"] for part in parts) == ANSWER
    assert {part["message"]["role"] for part in (*parts, last)} == {"assistant"}
    assert last["message"]["content"] == "" and last["done_reason"] == "stop" and "context" not in last


async def test_a_call_is_one_line_with_arguments_as_an_object() -> None:
    lines, prompt = await chat("So." + CALL, tools=[TOOL])
    assert prompt.startswith("+look<user>")
    (call,) = [call for line in lines for call in line["message"].get("tool_calls", ())]
    assert call["function"] == {"index": 0, "name": "look", "arguments": {"city": "Rom"}}
    assert "".join(line["message"]["content"] for line in lines) == "So."
    (whole,), _ = await chat("So." + CALL, tools=[TOOL], stream=False)
    assert whole["message"]["tool_calls"] == [call] and whole["done_reason"] == "stop"


async def test_a_call_that_was_cut_off_is_content() -> None:
    cut = {"num_predict": len(ids(CALL)) - 16}
    (whole,), _ = await chat(CALL, tools=[TOOL], stream=False, options=cut)
    assert "tool_calls" not in whole["message"] and "look" in whole["message"]["content"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_with_numbers_that_json_lacks_is_content(stream: bool) -> None:
    lines, _ = await chat(CALL.replace('"Rom"', "1e999"), tools=[TOOL], stream=stream)
    assert lines[-1]["done"] and not any("tool_calls" in line["message"] for line in lines)
    assert "".join(line["message"]["content"] for line in lines) == 'look({"city": 1e999}'


async def test_messages_sent_back() -> None:
    messages = [
        *HI,
        {"role": "assistant", "thinking": "Hm.", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
        {"role": "tool", "tool_name": "look", "content": "rain"},
    ]
    _, prompt = await chat("It rains.", messages=messages, tools=[TOOL])
    assert "<think>Hm.</think>" in prompt and '"name": "look"' in prompt and "rain" in prompt


async def test_reasoning_is_apart_from_the_content() -> None:
    lines, _ = await chat("<think>Hm.</think>Yes.")
    assert "".join(line["message"].get("thinking", "") for line in lines) == "Hm."
    assert "".join(line["message"]["content"] for line in lines) == "Yes."
    (whole,), prompt = await chat("<think>Hm.</think>Yes.", think="low", stream=False)
    assert (whole["message"]["thinking"], whole["message"]["content"]) == ("Hm.", "Yes.")
    assert prompt.endswith("<assistant>low")


async def test_logprobs() -> None:
    reply = await generate(logprobs=True, top_logprobs=2, options={"num_predict": 2})
    assert [entry["token"] for entry in reply["logprobs"]] == ["T", "h"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in reply["logprobs"])


async def test_format_binds_the_answer() -> None:
    engine = ScriptedEngine(says("a"))
    for given in ("json", {"type": "object", "properties": {"a": {"type": "integer"}}}, {}):
        await generate(engine, format=given)
    await generate(engine, format="")
    first, second, anything, none = (request.grammar for request in engine.submitted)
    assert first is not None and second is not None and '"integer"' in second.definition
    assert anything is not None and none is None
    status, message = error_of(await post("/api/generate", {"model": MODEL, "prompt": "a", "format": {"not": {}}}))
    assert status == 400 and "format" in message


@pytest.mark.parametrize("content", [5, ["a"], {"a": 1}, True])
async def test_a_message_with_pictures_has_a_text_or_none(content: Any) -> None:
    message = {"role": "user", "content": content, "images": ["aGk="]}
    status, text = error_of(await post("/api/chat", {"model": MODEL, "messages": [message]}))
    assert status == 400 and "content" in text
    message["content"] = None
    answered = [message, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    assert (await post("/api/chat", {"model": MODEL, "messages": answered})).status_code == 200
