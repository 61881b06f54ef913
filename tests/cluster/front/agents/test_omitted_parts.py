"""Checks that chats omit and name parts that a text model cannot read and tools that other servers run, and that strict
requests are refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.body import HEADER, STRICT_HEADER
from support.clusters import served as served_module
from support.clusters.served import MODEL, ScriptedEngine, says, tokenizer
from support.clusters.tool_chats import served

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
OLLAMA, GENERATE = "/api/chat", "/api/generate"
FUNCTION = {"type": "function", "function": {"name": "look"}}
FLAT = {"type": "function", "name": "look", "parameters": {}}


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)


async def post(
    path: str, *, answer: str = "Yes.", is_strict: bool = False, **fields: Any
) -> tuple[httpx.Response, str]:
    """Returns the reply and the engine's prompt."""
    engine = ScriptedEngine(says(answer))
    async with served(engine) as http:
        more = {STRICT_HEADER: "true"} if is_strict else {}
        reply = await http.post(path, json={"model": MODEL} | fields, headers=more)
    return reply, tokenizer().decode(engine.submitted[0].prompt) if engine.submitted else ""


def said(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": [*parts]}]


HI, IN = {"type": "text", "text": "Hi"}, {"type": "input_text", "text": "Hi"}


PARTS: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"messages": said(HI, {"type": "image_url", "image_url": {"url": "data:"}})}, "content.image_url", "[image"),
    (
        CHAT,
        {"messages": said(HI, {"type": "input_audio", "input_audio": {"data": ""}})},
        "content.input_audio",
        "[audio",
    ),
    (CHAT, {"messages": said(HI, {"type": "video_url", "video_url": {"url": "x"}})}, "content.video_url", "[video"),
    (CHAT, {"messages": said(HI, {"type": "file", "file": {"file_id": "x"}})}, "content.file", "[file"),
    (RESPONSES, {"input": said(IN, {"type": "input_image", "image_url": "data:"})}, "content.input_image", "[image"),
    (RESPONSES, {"input": said(IN, {"type": "input_file", "file_id": "x"})}, "content.input_file", "[file"),
    (
        RESPONSES,
        {
            "input": [
                {"type": "computer_call", "call_id": "c", "action": {"type": "click"}},
                {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}},
            ]
        },
        "content.computer_screenshot",
        "[screenshot",
    ),
    (MESSAGES, {"messages": said(HI, {"type": "image", "source": {}})}, "content.image", "[image"),
    (
        MESSAGES,
        {"messages": said(HI, {"type": "document", "source": {"type": "base64"}})},
        "content.document",
        "[document",
    ),
    (
        MESSAGES,
        {"messages": said(HI, {"type": "container_upload", "file_id": "x"})},
        "content.container_upload",
        "[container",
    ),
    (
        MESSAGES,
        {"messages": said({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]})},
        "content.image",
        "[image",
    ),
    (
        MESSAGES,
        {"messages": [*said({"type": "text", "text": "Hi"}), *said({"type": "image"}, role="system")]},
        "content.image",
        "[image",
    ),
    (
        OLLAMA,
        {"messages": [{"role": "user", "content": "Hi", "images": ["aGk="]}], "stream": False},
        "content.images",
        "<user>[image",
    ),
    (GENERATE, {"prompt": "Hi", "images": ["aGk="], "stream": False}, "content.images", "<user>[image"),
]


@pytest.mark.parametrize(("path", "fields", "named", "shown"), PARTS)
async def test_parts_that_are_no_text(path: str, fields: dict[str, Any], named: str, shown: str) -> None:
    reply, prompt = await post(path, **fields)
    assert reply.status_code == 200, reply.text
    assert named in reply.headers[HEADER].split(", ")
    assert f"{shown} omitted: this model reads text only]" in prompt
    refused, prompt = await post(path, is_strict=True, **fields)
    assert refused.status_code == 400 and not prompt and "remove it" in refused.text


async def test_an_ollama_reply_without_its_image_has_a_context() -> None:
    reply, prompt = await post(GENERATE, prompt="Hi", images=["aGk="], stream=False)
    assert prompt.endswith("]\nHi<assistant>") and reply.json()["context"]


TOOLS: list[tuple[str, dict[str, Any], str]] = [
    *((RESPONSES, {"type": kind}, kind) for kind in ("file_search", "mcp", "code_interpreter", "image_generation")),
    (RESPONSES, {"type": "computer_use_preview", "display_width": 9}, "computer_use_preview"),
    (RESPONSES, {"type": "shell", "environment": {"type": "container_auto"}}, "shell"),
    *(
        (MESSAGES, {"type": kind, "name": "a"}, kind)
        for kind in ("web_fetch_20250910", "web_search_20250305", "computer_20250124")
    ),
    *((MESSAGES, {"type": kind, "name": "a"}, kind) for kind in ("code_execution_20250825", "mcp_toolset")),
    *((CHAT, {"type": kind}, kind) for kind in ("web_search", "browser_20260101", "openrouter:web_search")),
]


@pytest.mark.parametrize(("path", "tool", "kind"), TOOLS)
async def test_tools_of_other_servers(path: str, tool: dict[str, Any], kind: str) -> None:
    own = {CHAT: FUNCTION, RESPONSES: FLAT, MESSAGES: {"name": "look", "input_schema": {}}}[path]
    fields: dict[str, Any] = {
        "tools": [tool, own],
        ("input" if path == RESPONSES else "messages"): [{"role": "user", "content": "Hi"}],
    }
    reply, prompt = await post(path, **fields)
    assert reply.status_code == 200 and prompt.startswith("+look<user>Hi"), reply.text
    assert f"tools.{kind}" in reply.headers[HEADER].split(", ")
    refused, _ = await post(path, is_strict=True, **fields)
    assert refused.status_code == 400 and kind in refused.text
    choice = {"type": "tool", "name": "a"} if path == MESSAGES else {"type": kind}
    demanded, prompt = await post(path, **fields, tool_choice=choice)
    assert demanded.status_code == 400 and not prompt and "tool_choice" in demanded.text


async def test_allowed_tools_may_name_hosted_ones() -> None:
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "file_search"}, {"type": "function", "name": "look"}],
    }
    fields: dict[str, Any] = {"input": "Hi", "tools": [{"type": "file_search"}, FLAT]}
    reply, prompt = await post(RESPONSES, **fields, tool_choice=allowed)
    assert reply.status_code == 200 and prompt.startswith("+look")
    nothing = allowed | {"mode": "required", "tools": [{"type": "file_search"}]}
    reply, _ = await post(RESPONSES, **fields, tool_choice=nothing)
    assert reply.status_code == 400 and "tool_choice" in reply.text


ITEMS: list[tuple[dict[str, Any], str]] = [
    ({"type": "web_search_call", "id": "ws", "action": {"type": "search", "query": "pandas"}}, '"query": "pandas"}'),
    ({"type": "file_search_call", "queries": ["bamboo"], "results": None}, '["bamboo"]'),
    ({"type": "code_interpreter_call", "code": "1 + 1", "outputs": []}, "1 + 1"),
    (
        {"type": "mcp_call", "name": "find", "server_label": "s", "arguments": "{}", "output": "none"},
        '"output": "none"',
    ),
    ({"type": "image_generation_call", "result": "AA==", "revised_prompt": "a panda"}, "a panda"),
    ({"type": "tool_search_call", "call_id": None, "arguments": {"query": "maps"}}, "maps"),
    ({"type": "compaction", "encrypted_content": "gAAAAA"}, "summarized by another server"),
]


@pytest.mark.parametrize(("item", "text"), ITEMS)
async def test_items_of_other_servers_are_text(item: dict[str, Any], text: str) -> None:
    reply, prompt = await post(RESPONSES, input=[{"role": "user", "content": "Hi"}, item])
    assert reply.status_code == 200 and text in prompt and "AA==" not in prompt
    strict, _ = await post(RESPONSES, is_strict=True, input=[{"role": "user", "content": "Hi"}, item])
    assert strict.status_code == (200 if item["type"] == "tool_search_call" else 400)  # Clients may search tools.


@pytest.mark.parametrize("kind", ["function_call_output", "tool_search_output"])
async def test_an_output_may_lack_the_id_of_its_call(kind: str) -> None:
    output = {"type": kind, "call_id": None, "id": "o", "output": "sunny"}
    reply, prompt = await post(RESPONSES, input=[{"role": "user", "content": "Hi"}, output])
    assert reply.status_code == 200 and prompt == "<user>Hi<tool>sunny<assistant>"


@pytest.mark.parametrize("kind", ["mcp_list_tools", "compaction_trigger", "something_new"])
async def test_items_that_say_nothing_are_named(kind: str) -> None:
    reply, prompt = await post(RESPONSES, input=[{"type": kind, "id": "a"}, {"role": "user", "content": "Hi"}])
    assert reply.status_code == 200 and reply.headers[HEADER] == f"input.{kind}" and prompt == "<user>Hi<assistant>"
    more = {"type": "additional_tools", "role": "developer", "tools": [FLAT]}
    reply, _ = await post(RESPONSES, input=[more, {"role": "user", "content": "Hi"}])
    assert reply.status_code == 200 and HEADER not in reply.headers
    reply, _ = await post(RESPONSES, input=[{"type": "mesage", "role": "user", "content": "Hi"}])
    assert reply.status_code == 400 and "mesage" in reply.text


async def test_empty_input_with_instructions() -> None:
    reply, prompt = await post(RESPONSES, input=[], instructions="Be brief.")
    assert reply.status_code == 200 and prompt == "<system>Be brief.<assistant>"


BLOCKS = [
    ({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "pandas"}}, "assistant", "pandas"),
    ({"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"title": "Zoo"}]}, "assistant", "Zoo"),
    ({"type": "mcp_tool_use", "id": "s", "name": "find", "server_name": "maps", "input": {}}, "assistant", "maps"),
    ({"type": "document", "source": {"type": "text", "data": "Once."}}, "user", "Once."),
    ({"type": "document", "source": {"type": "content", "content": "Once."}}, "user", "Once."),
    (
        {"type": "search_result", "title": "T", "source": "S", "content": [{"type": "text", "text": "Found."}]},
        "user",
        "Found.",
    ),
    (
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_reference", "tool_name": "Find"}]},
        "user",
        "Find",
    ),
]


@pytest.mark.parametrize(("block", "role", "text"), BLOCKS)
async def test_blocks_with_text(block: dict[str, Any], role: str, text: str) -> None:
    messages = [*said({"type": "text", "text": "Hi"}), *said(block, role=role), *said({"type": "text", "text": "And?"})]
    reply, prompt = await post(MESSAGES, messages=messages)
    assert reply.status_code == 200 and text in prompt, reply.text


@pytest.mark.parametrize("content", ["Once.", [{"type": "text", "text": "Once."}]])
async def test_documents_within_texts_keep_their_texts(content: Any) -> None:
    document = {"type": "document", "source": {"type": "content", "content": content}}
    found = {"type": "search_result", "title": "T", "source": "S", "content": [document]}
    reply, prompt = await post(MESSAGES, is_strict=True, system=[document], messages=said(found))
    assert reply.status_code == 200 and prompt == "<system>Once.<user>T\nS\nOnce.<assistant>", reply.text


ASKED = {"id": 42, "status": "open", "type": "bug", "data": "YWJj", "result": [1], "title": "t", "none": None}


@pytest.mark.parametrize(
    ("block", "kept"),
    [
        ({"type": "mcp_tool_use", "id": "s", "name": "find", "input": ASKED}, ASKED),
        ({"type": "mcp_tool_result", "tool_use_id": "s", "content": [{"type": "text", "status": "open"}]}, "open"),
        ({"type": "web_fetch_tool_result", "content": {"source": {"type": "text", "data": "Once"}}}, "Once"),
        ({"type": "bash_tool_result", "content": {"type": "result", "result": {"call_id": 7}}}, {"call_id": 7}),
    ],
)
async def test_fields_of_what_a_tool_was_asked_or_found_are_kept(block: dict[str, Any], kept: Any) -> None:
    messages = [*said({"type": "text", "text": "Hi"}), *said(block, role="assistant")]
    _, prompt = await post(MESSAGES, messages=[*messages, *said({"type": "text", "text": "And?"})])
    assert json.dumps(kept) in prompt and "tool_use_id" not in prompt


async def test_encrypted_texts_and_bytes_of_media_are_left_out_at_any_depth() -> None:
    found = [
        {"title": "Zoo", "encrypted_content": "c2VjcmV0", "encrypted_index": "aW5kZXg="},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0K"}},
        {"type": "input_image", "image_url": "data:image/png;base64,R0lGODlh"},
    ]
    block = {"type": "web_search_tool_result", "tool_use_id": "s", "content": found}
    messages = [*said({"type": "text", "text": "Hi"}), *said(block, role="assistant")]
    _, prompt = await post(MESSAGES, messages=[*messages, *said({"type": "text", "text": "And?"})])
    assert "Zoo" in prompt and "image/png" in prompt
    assert not any(text in prompt for text in ("c2VjcmV0", "aW5kZXg=", "iVBORw0K", "R0lGODlh"))
