"""Tests of tools that clients of the Responses API run: each is a function for the model and has its own call items."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from llamaclust.cluster.front.body import HEADER
from llamaclust.cluster.front.dialects.openai.tools import read_tools
from llamaclust.cluster.front.schema import LenientContext
from support.clusters import served as served_module
from support.clusters.served import ScriptedEngine, events_of, says, tokenizer
from support.clusters.tool_chats import served

PATH = "/v1/responses"
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
PATCH = '*** Begin Patch\n+"two"\n*** End Patch'
MAPS = {
    "type": "namespace",
    "name": "maps",
    "description": "A.",
    "tools": [{"type": "function", "name": "find", "parameters": {}}],
}
TOOLS: list[tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = [
    (
        MAPS,
        "maps__find",
        {"at": 1},
        {"type": "function_call", "name": "find", "namespace": "maps", "arguments": '{"at": 1}'},
    ),
    (
        {"type": "custom", "name": "apply_patch", "format": {"type": "text"}},
        "apply_patch",
        {"input": PATCH},
        {"type": "custom_tool_call", "name": "apply_patch", "input": PATCH},
    ),
    (
        {"type": "namespace", "name": "js", "description": "A.", "tools": [{"type": "custom", "name": "run"}]},
        "js__run",
        {"input": "1 + 1"},
        {"type": "custom_tool_call", "name": "run", "namespace": "js", "input": "1 + 1"},
    ),
    (
        {"type": "local_shell"},
        "local_shell",
        {"command": ["ls", "-l"]},
        {"type": "local_shell_call", "action": {"type": "exec", "command": ["ls", "-l"], "env": {}}},
    ),
    (
        {"type": "shell", "environment": {"type": "local"}},
        "shell",
        {"commands": ["ls"], "timeout_ms": 9},
        {"type": "shell_call", "action": {"commands": ["ls"], "timeout_ms": 9}},
    ),
    (
        {"type": "apply_patch"},
        "apply_patch",
        {"type": "delete_file", "path": "a"},
        {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a", "diff": ""}},
    ),
    (
        {"type": "tool_search", "execution": "client", "description": "Finds."},
        "tool_search",
        {"query": "maps"},
        {"type": "tool_search_call", "execution": "client", "arguments": {"query": "maps"}},
    ),
    (
        {"type": "tool_search", "execution": "client", "parameters": {"type": "object", "properties": {"words": {}}}},
        "tool_search",
        {"words": ["a", "b"]},
        {"type": "tool_search_call", "execution": "client", "arguments": {"words": ["a", "b"]}},
    ),
]


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("tool", "function", "arguments", "wanted"), TOOLS)
async def test_a_call_and_its_result(
    tool: dict[str, Any], function: str, arguments: dict[str, Any], wanted: dict[str, Any], stream: bool
) -> None:
    engine = ScriptedEngine(says(f"<tool_call>{json.dumps({'name': function, 'arguments': arguments})}</tool_call>"))
    body: dict[str, Any] = {"input": [{"role": "user", "content": "Hi"}], "tools": [tool], "stream": stream}
    async with served(engine) as http:
        reply = await http.post(PATH, json=body)
        assert reply.status_code == 200, reply.text
        *events, response = (
            [event for event in events_of(reply.text) if event != "[DONE]"] if stream else [reply.json()]
        )
        shown = response["response"] if stream else response
        (call,) = shown["output"]
        assert wanted.items() <= call.items()
        assert shown["tools"][0]["type"] == tool["type"]
        for event in events:
            TypeAdapter(ResponseStreamEvent).validate_python(event)
        result = {"type": f"{wanted['type']}_output", "call_id": call["call_id"], "output": "one of many"}
        follow = await http.post(PATH, json=body | {"input": [*body["input"], call, result], "stream": False})
        assert follow.status_code == 200, follow.text
        again = await http.post(PATH, json={"previous_response_id": shown["id"], "input": [result], "tools": [tool]})
        assert again.status_code == 200, again.text
    prompts = [tokenizer().decode(request.prompt) for request in engine.submitted]
    assert prompts[0].startswith(f"+{function}<user>")
    assert f'"name": "{function}"' in prompts[1] and "<tool>one of many" in prompts[1]
    assert all(json.dumps(value) in prompts[1] for value in arguments.values())
    assert prompts[1] == prompts[2]


@pytest.mark.parametrize("choice", [{"type": "function", "name": "find", "namespace": "maps"}, {"type": "local_shell"}])
async def test_such_a_tool_can_be_demanded(choice: dict[str, Any]) -> None:
    async with served(ScriptedEngine(says("a"))) as http:
        body = {"input": "Hi", "tools": [MAPS, {"type": "local_shell"}]}
        assert (await http.post(PATH, json=body | {"tool_choice": choice})).status_code == 200
        refused = await http.post(PATH, json=body | {"tool_choice": {"type": "function", "name": "find"}})
        assert refused.status_code == 400 and "'find', which is not among the tools" in refused.text


def test_grammars_of_custom_tools() -> None:
    """Checks that a regular expression constrains the text and that a Lark grammar is only shown to the model."""
    context = LenientContext()
    regex = {"type": "grammar", "syntax": "regex", "definition": "[a-z]+|x"}
    lark = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
    named = [{"type": "custom", "name": name, "format": form} for name, form in (("a", regex), ("b", lark))]
    first, second = (tool.function["function"] for tool in read_tools(named, context).client)
    assert first["parameters"]["properties"]["input"]["pattern"] == "^(?:[a-z]+|x)$"
    assert 'start: "a"' in second["description"] and context.ignored == ["tools.custom.format"]
    with pytest.raises(ValueError, match="remove it"):
        read_tools(named, None)


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "namespace", "name": "a"},
        {"type": "custom"},
        {"type": "custom", "name": "a", "format": {"type": "grammar"}},
        {"type": "namespace", "name": "a", "tools": [{"type": "custom", "name": "b"}] * 1025},
        {},
    ],
)
async def test_tools_of_a_wrong_form_are_refused(tool: dict[str, Any]) -> None:
    async with served(ScriptedEngine(says("a"))) as http:
        reply = await http.post(PATH, json={"input": "Hi", "tools": [tool]})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools"


async def test_tools_of_all_namespaces_count_together() -> None:
    tools = [{"type": "namespace", "name": f"n{n}", "tools": [{"type": "custom", "name": "b"}] * 600} for n in range(2)]
    async with served(ScriptedEngine(says("a"))) as http:
        reply = await http.post(PATH, json={"input": "Hi", "tools": tools})
    assert reply.status_code == 400 and "more than 1024 tools" in reply.json()["error"]["message"]


async def test_a_call_that_was_cut_has_the_text_so_far() -> None:
    engine = ScriptedEngine(says('<tool_call>{"name": "run", "arguments": {"input": "abc'))
    async with served(engine) as http:
        body = {"input": "Hi", "tools": [{"type": "custom", "name": "run"}], "max_output_tokens": 50}
        reply = await http.post(PATH, json=body)
    assert HEADER not in reply.headers
    assert reply.json()["output"][0]["input"].startswith('{"input":')


FOUND: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"type": "function", "name": "plan", "parameters": {}}, "plan", {"type": "function_call", "name": "plan"}),
    (MAPS, "maps__find", {"type": "function_call", "name": "find", "namespace": "maps"}),
    ({"type": "custom", "name": "run"}, "run", {"type": "custom_tool_call", "name": "run"}),
]


@pytest.mark.parametrize("kind", ["tool_search_output", "additional_tools"])
@pytest.mark.parametrize(("tool", "function", "wanted"), FOUND)
async def test_tools_in_the_input_can_be_called(
    tool: dict[str, Any], function: str, wanted: dict[str, Any], kind: str
) -> None:
    """Checks that such tools are offered, are called in their own form, and stay with a stored response."""
    arguments = {"input": "a"} if tool["type"] == "custom" else {}
    engine = ScriptedEngine(says(f"<tool_call>{json.dumps({'name': function, 'arguments': arguments})}</tool_call>"))
    search = {"type": "tool_search_call", "call_id": "s1", "arguments": {"query": "a"}, "execution": "client"}
    holder: dict[str, Any] = {"type": kind, "tools": [tool, tool]}
    found = [search, {**holder, "call_id": "s1"}] if kind == "tool_search_output" else [{**holder, "role": "developer"}]
    async with served(engine) as http:
        body = {"input": [{"role": "user", "content": "Hi"}, *found], "tools": [{"type": "function", "name": "own"}]}
        reply = await http.post(PATH, json=body)
        assert reply.status_code == 200 and HEADER not in reply.headers, reply.text
        shown = reply.json()
        more = {"previous_response_id": shown["id"], "tools": body["tools"]}
        result = {"type": f"{wanted['type']}_output", "call_id": shown["output"][0]["call_id"], "output": "R"}
        again = await http.post(PATH, json=more | {"input": [result]})
        assert again.status_code == 200, again.text
        chosen = {"type": tool["type"], "name": wanted["name"]}
        if tool["type"] != "namespace":
            assert (await http.post(PATH, json=body | {"tool_choice": chosen})).status_code == 200
    for response in (shown, again.json()):
        assert wanted.items() <= response["output"][0].items()
        assert [each["name"] for each in response["tools"]] == ["own"]
    prompts = [tokenizer().decode(request.prompt) for request in engine.submitted]
    assert all(prompt.startswith(f"+own+{function}<") for prompt in prompts[:2])


async def test_hosted_searches_and_tools_are_left_out_and_named() -> None:
    holder = {"type": "additional_tools", "role": "developer", "tools": [{"type": "web_search"}]}
    async with served(ScriptedEngine(says("a"))) as http:
        body = {"input": [holder, {"role": "user", "content": "Hi"}], "tools": [{"type": "tool_search"}]}
        reply = await http.post(PATH, json=body)
    assert reply.status_code == 200
    assert {*reply.headers[HEADER].split(", ")} == {"tools.tool_search", "tools.web_search"}


@pytest.mark.parametrize("tools", [5, [{"type": "function"}], ["a"]])
async def test_tools_of_a_wrong_form_in_the_input_are_refused(tools: Any) -> None:
    async with served(ScriptedEngine(says("a"))) as http:
        reply = await http.post(PATH, json={"input": [{"type": "additional_tools", "tools": tools}]})
    assert reply.status_code == 400 and "[0]: tools: " in reply.text


@pytest.mark.parametrize("kind", ["web_search_call", "mcp_call", "code_interpreter_call", "image_generation_call"])
@pytest.mark.parametrize("tools", [1, True, {"a": 1}, ["x"], [{}], [{"type": "namespace"}], [LOOK]])
async def test_other_items_offer_no_tools(kind: str, tools: Any) -> None:
    item = {"type": kind, "id": "a", "tools": tools}
    async with served(ScriptedEngine(says("Yes."))) as http:
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            reply = await http.post(path, json={"input": [item, {"role": "user", "content": "Hi"}]})
            assert reply.status_code == 200, reply.text
        required = {"input": [item, {"role": "user", "content": "Hi"}], "tool_choice": "required"}
        reply = await http.post("/v1/responses", json=required)
    assert reply.status_code == 400 and "tool_choice" in reply.text


async def test_an_empty_id_is_a_reference_to_an_unknown_item() -> None:
    async with served(ScriptedEngine(says("Yes."))) as http:
        for item in ({"type": "", "id": ""}, {"type": "item_reference", "id": ""}, {"id": ""}):
            reply = await http.post("/v1/responses", json={"input": [item]})
            assert reply.status_code == 400 and "is not stored on this server" in reply.text
