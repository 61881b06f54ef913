"""Tests of tool calls and reasoning in chats: prompts, replies, streams, and OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from llamaclust.cluster.front.dialects.openai.schema import ChatBody
from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import MODEL, ScriptedEngine, client, events_of, make_app, says, serving, tokenizer
from support.clusters.tool_chats import CALL, TEMPLATE, served

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "run"}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


async def chat(answer: str, template: str = TEMPLATE, **fields: Any) -> tuple[Any, str]:
    """Returns the reply, or its events, and the engine's prompt."""
    engine = ScriptedEngine(says(answer))
    with ChatTemplate(template, "", "") as made:
        async with client(make_app(engine, made)) as http:
            reply = await http.post("/v1/chat/completions", json=CHAT | fields)
    assert reply.status_code == 200, reply.text
    prompt = tokenizer().decode(engine.submitted[0].prompt)
    return events_of(reply.text) if fields.get("stream") else reply.json(), prompt


async def message_of(answer: str, **fields: Any) -> dict[str, Any]:
    reply, _ = await chat(answer, **fields)
    found: dict[str, Any] = reply["choices"][0]["message"]
    return found


async def test_call() -> None:
    reply, prompt = await chat("I look." + CALL, tools=[TOOL, OTHER])
    (choice,) = reply["choices"]
    assert prompt == "+look+run<user>Hi<assistant>"
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "look", "arguments": '{"city": "Rom"}'}


async def test_content_is_null_beside_calls_alone() -> None:
    message = await message_of(CALL * 2, tools=[TOOL])
    assert message["content"] is None and len({call["id"] for call in message["tool_calls"]}) == 2


async def test_one_call_without_parallel_calls() -> None:
    message = await message_of(CALL * 2, tools=[TOOL], parallel_tool_calls=False)
    assert len(message["tool_calls"]) == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
async def test_a_choice_that_asks_for_a_call_gets_one_unless_parallel_calls_are_asked_for(choice: Any) -> None:
    body = {**CHAT, "tools": [TOOL], "tool_choice": choice}
    assert not ChatBody.model_validate(body).choice.use.is_parallel
    assert ChatBody.model_validate({**body, "parallel_tool_calls": True}).choice.use.is_parallel
    assert ChatBody.model_validate({**body, "tool_choice": "auto"}).choice.use.is_parallel
    assert len((await message_of(CALL * 2, tools=[TOOL], tool_choice=choice))["tool_calls"]) == 1


async def test_tools_beyond_the_context_are_refused_before_anything_is_made_of_them() -> None:
    value: Any = [1] * 1000
    for _ in range(150):
        value = [value]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": [value] * 40}}}
    engine = ScriptedEngine(says("a"))
    with ChatTemplate(TEMPLATE, "", "") as made:
        async with client(make_app(engine, made)) as http:
            reply = await http.post("/v1/chat/completions", json=CHAT | {"tools": [tool]})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"


async def test_a_tool_that_is_no_definition_is_refused_where_templates_are_applied() -> None:
    with ChatTemplate(TEMPLATE, "", "") as made:
        async with client(make_app(ScriptedEngine(says("a")), made)) as http:
            reply = await http.post("/apply-template", json=CHAT | {"tools": [{}]})
    assert reply.status_code == 400 and reply.json()["error"]["param"].startswith("tools")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
@pytest.mark.parametrize("begun", [CALL[:40], CALL + CALL[:40], CALL])
async def test_a_continued_message_that_has_begun_a_call(path: str, begun: str) -> None:
    """Checks that the continued call is the answer's only one, whole or streamed."""
    tool = {"name": "look", "input_schema": {"type": "object"}} if path == "/v1/messages" else TOOL
    messages = [*CHAT["messages"], {"role": "assistant", "content": begun}]
    body = {"model": MODEL, "max_tokens": 90, "messages": messages, "tools": [tool]}
    async with served(ScriptedEngine(says(CALL[len(begun) % len(CALL) :]))) as http:
        replies = [await http.post(path, json=body | {"stream": stream}) for stream in (False, True)]
    for reply in replies:
        assert reply.status_code == 200 and "error" not in reply.text
        assert reply.text.count('"look"') == 1 and '"index":-1' not in reply.text
    whole = replies[0].json()
    if path == "/v1/messages":
        assert whole["content"][-1]["input"] == {"city": "Rom"} and whole["stop_reason"] == "tool_use"
    else:
        message = whole["message"] if path == "/api/chat" else whole["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert call["function"]["arguments"] in ({"city": "Rom"}, '{"city": "Rom"}')


async def test_without_tools_the_text_stays() -> None:
    assert (await message_of(CALL))["content"] == CALL
    reply, prompt = await chat(CALL, tools=[TOOL], tool_choice="none")
    assert reply["choices"][0]["message"]["content"] == CALL and prompt == "<user>Hi<assistant>"


async def test_a_named_tool_is_the_only_one_offered() -> None:
    choice = {"type": "function", "function": {"name": "look"}}
    reply, prompt = await chat(CALL, tools=[TOOL, OTHER], tool_choice=choice)
    assert prompt.startswith("+look<user>") and reply["choices"][0]["finish_reason"] == "tool_calls"


async def test_stream() -> None:
    *chunks, done = (await chat("So." + CALL, tools=[TOOL], stream=True))[0]
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "So."
    assert calls[0]["function"]["name"] == "look" and calls[0]["id"] and calls[0]["type"] == "function"
    assert all("id" not in call and "name" not in call["function"] for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Rom"}'
    assert len(calls) > 3 and choices[-1]["finish_reason"] == "tool_calls"


async def test_reasoning() -> None:
    message = await message_of("<think>Hm.</think>\n\nYes.")
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    raw = await message_of("<think>Hm.</think>\n\nYes.", reasoning_format="none")
    assert raw["content"] == "<think>Hm.</think>\n\nYes." and "reasoning_content" not in raw
    *chunks, _ = (await chat("<think>Hm.</think>Yes.", stream=True))[0]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."


async def test_reasoning_that_the_prompt_opens() -> None:
    reply, prompt = await chat("Hm.</think>Yes.", chat_template_kwargs={"opens": True})
    message = reply["choices"][0]["message"]
    assert prompt.endswith("<think>") and (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


async def test_no_budget_ends_the_reasoning_that_the_prompt_opens() -> None:
    always = TEMPLATE.replace("{% if opens and enable_thinking %}<think>{% endif %}", "<think>")
    reply, prompt = await chat("Yes.", template=always, thinking_budget_tokens=0)
    assert prompt.endswith("<think></think>\n\n") and reply["choices"][0]["message"]["content"] == "Yes."
    _, prompt = await chat("Yes.", reasoning_budget=0, chat_template_kwargs={"opens": True})
    assert prompt.endswith("<assistant>")


@pytest.mark.parametrize(
    ("default", "tokens", "is_closed"), [(0, 64, False), (0, None, True), (64, 0, True), (None, 0, True)]
)
async def test_a_budget_of_thinking_precedes_the_cluster_files(
    default: int | None, tokens: int | None, is_closed: bool
) -> None:
    always = TEMPLATE.replace("{% if opens and enable_thinking %}<think>{% endif %}", "<think>")
    engine = ScriptedEngine(says("Yes."))
    settings: dict[str, Any] = {} if default is None else {"defaults": {"reasoning_budget": default}}
    thinking = {"type": "enabled"} | ({} if tokens is None else {"budget_tokens": tokens})
    with ChatTemplate(always, "", "") as made:
        async with client(make_app(engine, made, **settings)) as http:
            reply = await http.post("/v1/messages", json=CHAT | {"max_tokens": 90, "thinking": thinking})
    assert reply.status_code == 200, reply.text
    assert ("</think>" in tokenizer().decode(engine.submitted[0].prompt)) is is_closed


@pytest.mark.parametrize("name", ["reasoning_budget", "thinking_budget_tokens", "thinking_budget"])
async def test_a_budget_is_obeyed_by_the_last_stage(name: str) -> None:
    engine = ScriptedEngine(says("Hm.</think>Yes."))
    fields = {name: 5, "reasoning_budget_message": " Well.", "chat_template_kwargs": {"opens": True}}
    async with served(engine) as http:
        reply = await http.post("/v1/chat/completions", json=CHAT | fields)
        assert reply.status_code == 200 and "x-llamaclust-ignored" not in reply.headers
        await http.post("/v1/chat/completions", json=CHAT)
    reasoning = engine.submitted[0].reasoning
    assert reasoning is not None and reasoning.is_open and reasoning.budget == 5
    assert tokenizer().decode_bytes(reasoning.forced).strip() == b"Well.</think>"
    assert engine.submitted[1].reasoning is None


_HELLO = {"messages": CHAT["messages"], "stream": False, "model": MODEL}
_BUDGET_BODIES = [
    ("/v1/chat/completions", _HELLO | {"thinking_token_budget": 5}),
    ("/v1/messages", _HELLO | {"max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 5}}),
    ("/v1/messages", _HELLO | {"max_tokens": 9, "reasoning_budget": 5}),
    ("/v1/responses", {"input": "Hi", "model": MODEL, "thinking_budget_tokens": 5}),
    ("/api/chat", _HELLO | {"options": {"reasoning_budget": 5}}),
    ("/api/generate", {"prompt": "Hi", "model": MODEL, "stream": False, "options": {"reasoning_budget": 5}}),
]


@pytest.mark.parametrize(("path", "body"), _BUDGET_BODIES)
async def test_each_chat_api_takes_a_budget_of_reasoning(path: str, body: dict[str, Any]) -> None:
    engine = ScriptedEngine(says("Yes."))
    async with served(engine) as http:
        reply = await http.post(path, json=body)
    assert reply.status_code == 200 and "x-llamaclust-ignored" not in reply.headers, reply.text
    (generation,) = engine.submitted
    assert generation.reasoning is not None and generation.reasoning.budget == 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
async def test_the_cluster_file_may_have_a_default_budget(path: str) -> None:
    engine = ScriptedEngine(says("Yes."))
    async with served(engine, defaults={"reasoning_budget": 7}) as http:
        assert (await http.post(path, json=_HELLO)).status_code == 200
    (generation,) = engine.submitted
    assert generation.reasoning is not None and generation.reasoning.budget == 7


async def test_a_message_that_would_end_the_reasoning_is_refused() -> None:
    async with served(ScriptedEngine(says(""))) as http:
        fields = {"reasoning_budget": 5, "reasoning_budget_message": "So</think>"}
        reply = await http.post("/v1/chat/completions", json=CHAT | fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "reasoning_budget_message"


async def test_calls_and_results_come_back_to_the_template() -> None:
    call = {"id": "a1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Rom"}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "a1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    _, prompt = await chat("Ok", messages=messages, tools=[TOOL])
    assert prompt == f"+look<user>Hi<assistant><think>Hm.</think>{CALL}<tool>sunny<assistant>"


async def test_a_template_without_tools_gets_them_as_text() -> None:
    short = {"type": "function", "function": {"name": "f", "parameters": {}}}
    from support.clusters import served

    engine = ScriptedEngine(says("a"))
    with ChatTemplate(PLAIN, "", "") as made:
        async with client(make_app(engine, made)) as http:
            reply = await http.post("/apply-template", json=CHAT | {"tools": [short]})
    assert served.CONTEXT and reply.status_code == 200, reply.text
    prompt = reply.json()["prompt"]
    assert prompt.startswith("<system>") and '"name": "f"' in prompt and prompt.endswith("<user>Hi")


async def test_the_official_client_puts_a_stream_together() -> None:
    engine = ScriptedEngine(says("So." + CALL + CALL))
    with ChatTemplate(TEMPLATE, "", "") as made:
        async with (
            serving(make_app(engine, made)) as address,
            AsyncOpenAI(base_url=f"{address}/v1", api_key="k", http_client=DefaultAsyncHttpxClient()) as openai,
            openai.chat.completions.stream(model="tiny", tools=[TOOL], **CHAT) as stream,
        ):
            async for _ in stream:
                pass
            message = (await stream.get_final_completion()).choices[0].message
    assert message.content == "So." and message.tool_calls is not None
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"city": "Rom"}] * 2


async def test_markers_that_are_control_tokens() -> None:
    """Checks that control tokens are not part of an answer's text but are parsed as markers of calls."""
    template = TEMPLATE.replace("<tool_call>", "<|im_start|>").replace("</tool_call>", "")
    text = 'So.<|im_start|>{"name": "look", "arguments": {"city": "Rom"}}'
    tokens = tokenizer().encode(text, add_special=False, parse_special=True)
    engine = ScriptedEngine(lambda _: tokens)
    with ChatTemplate(template, "", "") as made:
        async with client(make_app(engine, made)) as http:
            reply = await http.post("/v1/chat/completions", json=CHAT | {"tools": [TOOL]})
            plain = await http.post("/v1/completions", json={"prompt": "a"})
    (choice,) = reply.json()["choices"]
    assert choice["message"]["content"] == "So." and choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rom"}'
    assert plain.json()["choices"][0]["text"].startswith('So.{"name"')
    grammar = engine.submitted[0].grammar
    assert grammar is not None and grammar.triggers == ("<|im_start|>",) and "<[" in grammar.definition


@pytest.mark.parametrize("answer", ["<tool_call>{", "<think>", "<tool_call>nothing", '<tool_call>{"name": "look"'])
async def test_answers_that_are_cut(answer: str) -> None:
    *chunks, _ = (await chat(answer, tools=[TOOL], stream=True))[0]
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stop": ["Ro"]}, "stop"),
        ({"stop_token_ids": tokenizer().encode("R", add_special=False)}, "stop"),
        ({"stop": ["</tool_call>"]}, "tool_calls"),
        ({"stop": ["nothing"]}, "tool_calls"),
    ],
)
async def test_a_call_that_a_stop_string_cuts_is_not_to_be_run(
    fields: dict[str, Any], reason: str, stream: bool
) -> None:
    reply, _ = await chat("So." + CALL, tools=[TOOL], stream=stream, **fields)
    last = reply[-2] if stream else reply
    assert last["choices"][0]["finish_reason"] == reason
    if "stop" not in fields:
        return  # /v1/responses refuses stop_token_ids
    async with served(ScriptedEngine(says("So." + CALL))) as http:
        body = {"input": "Hi", "tools": [{"type": "function", "name": "look", "parameters": SCHEMA}], "stream": stream}
        answer = await http.post("/v1/responses", json=body | fields)
    response = events_of(answer.text)[-2]["response"] if stream else answer.json()
    call = response["output"][-1]
    status = "completed" if reason == "tool_calls" else "incomplete"
    assert (call["type"], call["status"]) == ("function_call", status)


UNMARKED = '```json\n{"name": "look", "arguments": {"city": "Rom"}}\n```'


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_nothing_but_a_call_is_that_call(stream: bool) -> None:
    reply, _ = await chat(UNMARKED, tools=[TOOL, OTHER], stream=stream)
    if stream:
        deltas = [event["choices"][0]["delta"] for event in reply[:-1]]
        assert not any(delta.get("content") for delta in deltas)
        (call,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert reply[-2]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        (call,) = reply["choices"][0]["message"]["tool_calls"]
        assert reply["choices"][0]["message"]["content"] is None
    assert call["function"] == {"name": "look", "arguments": '{"city": "Rom"}'}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [OTHER]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        {"tools": [TOOL], "messages": [*CHAT["messages"], {"role": "assistant", "content": "It is:"}]},
    ],
)
async def test_an_answer_that_looks_like_a_call_is_text_where_it_cannot_be_one(fields: dict[str, Any]) -> None:
    message = await message_of(UNMARKED, **fields)
    assert message["content"] == UNMARKED and "tool_calls" not in message


@pytest.mark.parametrize("content", [None, "I look."])
@pytest.mark.parametrize(
    ("path", "arguments", "fields"),
    [
        ("/v1/chat/completions", "{}", {}),
        ("/v1/chat/completions", "{}", {"continue_final_message": True}),
        ("/api/chat", {}, {"model": MODEL}),
    ],
)
async def test_a_chat_that_ends_with_calls_is_refused(
    path: str, arguments: Any, fields: dict[str, Any], content: str | None
) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": arguments}}
    answer = {"role": "assistant", "content": content or "", "tool_calls": [call]}
    engine = ScriptedEngine(says("a"))
    async with served(engine) as http:
        reply = await http.post(path, json={"messages": [*CHAT["messages"], answer], "tools": [TOOL], **fields})
    assert reply.status_code == 400 and "add a message of role tool for each" in reply.text and not engine.submitted
