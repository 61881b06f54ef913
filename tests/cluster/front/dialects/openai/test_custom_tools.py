"""Tests of custom tools in chat completions: whole and streamed calls, calls that are sent back, choice of tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletionMessageCustomToolCall

from llamaclust.cluster.front.body import HEADER
from llamaclust.cluster.front.dialects.openai.schema import ChatBody
from llamaclust.cluster.front.schema import LenientContext
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.core.errors import ParameterError
from llamaclust.model.chat.template import ChatTemplate
from support.clusters import served as served_module
from support.clusters.served import ScriptedEngine, events_of, make_app, says, serving, tokenizer
from support.clusters.tool_chats import TEMPLATE, served
from support.event_loop import pass_time

PATH = "/v1/chat/completions"
HELLO: dict[str, Any] = {"role": "user", "content": "Hi"}
CUSTOM: dict[str, Any] = {"type": "custom", "custom": {"name": "run", "description": "Runs a program."}}
FUNCTION: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": {}}}
TEXTS = ["1 + 1", '*** Begin Patch\n+"two" \\ é\n*** End Patch', ""]


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)


def call_of(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def calls_in(events: list[Any]) -> list[dict[str, Any]]:
    """Returns the calls of a stream, assembled like in clients."""
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"][0]["delta"].get("tool_calls", ()) if event != "[DONE]" else ():
            call = calls.setdefault(piece["index"], {})
            kind = "custom" if "custom" in piece else "function"
            call |= {key: piece[key] for key in ("id", "type") if key in piece}
            for key, text in piece[kind].items():
                call.setdefault(kind, {})[key] = call.get(kind, {}).get(key, "") + text
    return [*calls.values()]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("text", TEXTS)
async def test_a_call_and_its_result(text: str, stream: bool) -> None:
    engine = ScriptedEngine(says("So." + call_of("look", {}) + call_of("run", {"input": text})))
    body: dict[str, Any] = {"messages": [HELLO], "tools": [CUSTOM, FUNCTION], "stream": stream}
    async with served(engine) as http:
        reply = await http.post(PATH, json=body)
        assert reply.status_code == 200 and HEADER not in reply.headers, reply.text
        shown = events_of(reply.text) if stream else [reply.json()]
        calls = calls_in(shown) if stream else shown[0]["choices"][0]["message"]["tool_calls"]
        assert shown[-2 if stream else 0]["choices"][0]["finish_reason"] == "tool_calls"
        assert calls[0]["type"] == "function" and calls[0]["function"] == {"name": "look", "arguments": "{}"}
        call = ChatCompletionMessageCustomToolCall.model_validate(calls[1])
        assert (call.custom.name, call.custom.input) == ("run", text) and call.id.startswith("call_")
        answer = {"role": "assistant", "content": "So.", "tool_calls": calls}
        results = [{"role": "tool", "tool_call_id": each["id"], "content": "done"} for each in calls]
        follow = await http.post(PATH, json=body | {"messages": [HELLO, answer, *results], "stream": False})
        assert follow.status_code == 200, follow.text
    first, second = (tokenizer().decode(request.prompt) for request in engine.submitted)
    assert first == "+run+look<user>Hi<assistant>"
    assert json.dumps({"input": text}, ensure_ascii=False) in second and "<tool>done<tool>done" in second


async def test_a_call_without_arguments_has_an_empty_text() -> None:
    async with served(ScriptedEngine(says(call_of("run", {})))) as http:
        reply = await http.post(PATH, json={"messages": [HELLO], "tools": [CUSTOM]})
    (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert call["custom"] == {"name": "run", "input": ""}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_call_that_was_cut_has_the_text_so_far(stream: bool) -> None:
    engine = ScriptedEngine(says(call_of("run", {"input": "abcdefghijklmnop"})))
    async with served(engine) as http:
        body = {"messages": [HELLO], "tools": [CUSTOM], "max_tokens": 50, "stream": stream}
        reply = await http.post(PATH, json=body)
    shown = events_of(reply.text) if stream else [reply.json()]
    (call,) = calls_in(shown) if stream else shown[0]["choices"][0]["message"]["tool_calls"]
    assert call["custom"]["name"] == "run" and call["custom"]["input"].startswith('{"input":')


async def test_a_stream_has_comments_while_the_text_of_a_call_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that tokens that show nothing, one a second, do not delay the comments."""
    chunks, append = 0, AnswerLog.append

    def append_later(log: AnswerLog, prompt: int, item: LogItem) -> None:
        nonlocal chunks
        chunks += 1
        pass_time(monkeypatch, 1.0)
        append(log, prompt, item)

    monkeypatch.setattr(AnswerLog, "append", append_later)
    engine = ScriptedEngine(says(call_of("run", {"input": "abcdefghijklmnop" * 6})))
    async with served(engine) as http:
        reply = await http.post(PATH, json={"messages": [HELLO], "tools": [CUSTOM], "stream": True})
    comments, events = reply.text.count(": waiting"), len(events_of(reply.text))
    assert chunks > 100 and events < 10 and chunks // 30 < comments <= chunks // 15


async def test_the_official_client() -> None:
    engine = ScriptedEngine(says(call_of("run", {"input": TEXTS[1]})))
    chat: Any = {"model": "tiny", "messages": [HELLO], "tools": [CUSTOM]}
    with ChatTemplate(TEMPLATE, "", "") as made:
        async with (
            serving(make_app(engine, made)) as address,
            AsyncOpenAI(base_url=f"{address}/v1", api_key="k", http_client=DefaultAsyncHttpxClient()) as openai,
        ):
            reply = await openai.chat.completions.create(**chat)
            call = (reply.choices[0].message.tool_calls or [])[0]
            assert isinstance(call, ChatCompletionMessageCustomToolCall) and call.custom.input == TEXTS[1]
            result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
            chat |= {"messages": [HELLO, reply.choices[0].message, result]}
            assert (await openai.chat.completions.create(**chat)).choices
    assert "<tool>done" in tokenizer().decode(engine.submitted[1].prompt)


def test_grammars() -> None:
    """Checks that a regular expression constrains the text and that a Lark grammar is only shown to the model."""
    context = LenientContext()
    grammars = [{"syntax": "regex", "definition": "[a-z]+|x"}, {"syntax": "lark", "definition": 'start: "a"'}]
    formats = [{"type": "text"}, *({"type": "grammar", "grammar": grammar} for grammar in grammars)]
    tools = [{"type": "custom", "custom": {"name": f"t{place}", "format": form}} for place, form in enumerate(formats)]
    body = ChatBody.model_validate({"messages": [HELLO], "tools": tools}, context=context)
    free, regex, lark = (tool["function"] for tool in body.request().tools)
    assert free["parameters"]["properties"]["input"] == {"type": "string"}
    assert regex["parameters"]["properties"]["input"]["pattern"] == "^(?:[a-z]+|x)$"
    assert 'start: "a"' in lark["description"] and context.ignored == ["tools.custom.format"]
    with pytest.raises(ValueError, match="remove it"):
        ChatBody.model_validate({"messages": [HELLO], "tools": tools})


def named(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, kind: {"name": name}}


def allowed(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*tools]}}


@pytest.mark.parametrize(
    ("choice", "offered", "mode"),
    [
        (named("custom", "run"), ["run"], "REQUIRED"),
        (named("function", "look"), ["look"], "REQUIRED"),
        (allowed("auto", named("custom", "run")), ["run"], "AUTO"),
        (allowed("required", named("function", "look"), {"type": "web_search"}), ["look"], "REQUIRED"),
        (allowed("required", named("function", "look"), named("custom", "run")), ["run", "look"], "REQUIRED"),
        ("auto", ["run", "look"], "AUTO"),
    ],
)
def test_a_choice_of_tools(choice: Any, offered: list[str], mode: str) -> None:
    body = ChatBody.model_validate({"messages": [HELLO], "tools": [CUSTOM, FUNCTION], "tool_choice": choice})
    body.check()
    request = body.request()
    assert [tool["function"]["name"] for tool in request.offered_tools] == offered
    assert request.tool_use.mode.name == mode


@pytest.mark.parametrize(
    "choice",
    [
        named("function", "run"),
        named("custom", "look"),
        allowed("auto", named("custom", "other")),
        allowed("none", named("custom", "run")),
        allowed("auto"),
        {"type": "allowed_tools", "mode": "auto", "tools": [named("custom", "run")]},
        {"type": "custom"},
        {},
    ],
)
def test_another_choice_is_refused(choice: Any) -> None:
    with pytest.raises((ParameterError, ValueError), match="tool_choice"):
        ChatBody.model_validate({"messages": [HELLO], "tools": [CUSTOM, FUNCTION], "tool_choice": choice}).check()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "grammar"}}}]}, "tools"),
        (
            {"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "grammar", "grammar": 1}}}]},
            "tools",
        ),
        ({"tools": [CUSTOM, {"type": "function", "function": {"name": "run"}}]}, "tools"),
        ({"messages": [HELLO, {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}]}, "messages"),
    ],
)
async def test_other_forms_are_refused(fields: dict[str, Any], param: str) -> None:
    async with served(ScriptedEngine(says("a"))) as http:
        reply = await http.post(PATH, json={"messages": [HELLO]} | fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"].startswith(param), reply.text


async def test_templates_are_applied_with_the_same_tools() -> None:
    body = {"messages": [HELLO], "tools": [CUSTOM, FUNCTION]}
    async with served(ScriptedEngine(says("a"))) as http:
        chosen = await http.post(
            "/apply-template", json=body | {"tool_choice": allowed("auto", named("custom", "run"))}
        )
        missing = await http.post("/apply-template", json=body | {"tool_choice": named("custom", "other")})
    assert chosen.json()["prompt"].startswith("+run<user>Hi")
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "tool_choice"
