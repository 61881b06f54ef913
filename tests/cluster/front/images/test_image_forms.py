"""Tests of the forms in which clients send images. All APIs read all forms, and nothing invents an image's content."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from llamaclust.cluster.client.http_codec import CHAT
from llamaclust.cluster.front.body import HEADER
from llamaclust.model.chat.template import ChatTemplate
from support.chat.vision import TinyVision, base64_of, data_url, image, laid_out
from support.clusters import served as served_module
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says, tokenizer
from support.clusters.tool_chats import TEMPLATE

MESSAGES, RESPONSES, OLLAMA, GENERATE = "/v1/messages", "/v1/responses", "/api/chat", "/api/generate"
IMAGE = image(2, b"first")
URL, BASE64 = data_url(IMAGE), base64_of(IMAGE)
FORMS: dict[str, dict[str, Any]] = {
    "OpenAI's chats": {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
    "a URL without an object": {"type": "image_url", "image_url": URL},
    "a URL beside the type": {"type": "image_url", "url": URL},
    "OpenAI's Responses": {"type": "input_image", "image_url": URL, "detail": "auto"},
    "OpenAI's Responses, as an object": {"type": "input_image", "image_url": {"url": URL}},
    "Anthropic's base64": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
    "Anthropic's URL": {"type": "image", "source": {"type": "url", "url": URL}},
    "MCP's results": {"type": "image", "data": BASE64, "mimeType": "image/png"},
    "transformers' URL": {"type": "image", "url": URL},
    "transformers' image": {"type": "image", "image": URL},
    "transformers' base64": {"type": "image", "base64": BASE64},
    "the AI SDK's image": {"type": "image", "image": BASE64, "mediaType": "image/png"},
    "the AI SDK's file": {"type": "file", "mediaType": "image/png", "data": BASE64},
    "OpenAI's file": {"type": "file", "file": {"filename": "a.png", "file_data": URL}},
    "Responses' file": {"type": "input_file", "filename": "a.png", "file_data": URL},
    "a screenshot": {"type": "computer_screenshot", "image_url": URL},
    "capitals in the URL": {
        "type": "image_url",
        "image_url": {"url": URL.replace("data:", "DATA:")},
    },
    "capitals in the encoding": {"type": "image_url", "image_url": {"url": URL.replace(";base64", ";BASE64")}},
}
TEXTS = {RESPONSES: "input_text"}
EXPECTED = laid_out("<user>a", IMAGE, "<assistant>")


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)


async def post(path: str, *, sees: bool = True, **fields: Any) -> tuple[httpx.Response, tuple[int, ...], list[bytes]]:
    """Returns the reply, the engine's prompt, and the images that the projector got."""
    engine, vision = ScriptedEngine(says("Yes.")), TinyVision()
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with client(make_app(engine, template, vision=vision if sees else None)) as http:
            reply = await http.post(path, json={"model": MODEL, "max_tokens": 9} | fields)
    prompt = engine.submitted[0].prompt if engine.submitted else ()
    return reply, prompt, [source.data for source in vision.images]


def asked(path: str, *parts: dict[str, Any], text: str = "a") -> dict[str, Any]:
    """Returns the fields of a request whose last message has a text and the parts."""
    content = [{"type": TEXTS.get(path, "text"), "text": text}] if text else []
    return {"input" if path == RESPONSES else "messages": [{"role": "user", "content": [*content, *parts]}]}


def answered(path: str, *parts: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request whose history has a message with the parts alone."""
    before = {"role": "user", "content": [*parts]}
    turns = [before, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    return {"input" if path == RESPONSES else "messages": turns}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_each_api_reads_each_form(path: str, form: str) -> None:
    reply, prompt, images = await post(path, **asked(path, FORMS[form]))
    assert reply.status_code == 200, reply.text
    assert images == [IMAGE] and prompt == EXPECTED
    assert "content" not in reply.headers.get(HEADER, "")


@pytest.mark.parametrize("form", FORMS)
async def test_results_of_tools_have_images_in_each_form(form: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [FORMS[form]]},
    ]
    assert (await post(CHAT, messages=chat))[2] == [IMAGE]
    use = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [FORMS[form]]}
    blocks = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    assert (await post(MESSAGES, messages=blocks))[2] == [IMAGE]
    items = [
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [FORMS[form]]},
    ]
    assert (await post(RESPONSES, input=items))[2] == [IMAGE]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "file_id": "file-1"},
        {"type": "image", "source": {"type": "file", "file_id": "file-2"}},
        {"type": "image", "path": "picture.png"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": 5}},
    ],
)
async def test_an_image_in_an_unknown_form_is_refused(path: str, part: dict[str, Any]) -> None:
    reply, prompt, _ = await post(path, **asked(path, part))
    assert reply.status_code == 400 and not prompt and "expected the image" in reply.text


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("kind", ["input_audio", "video_url", "document"])
async def test_the_text_for_other_media_says_what_a_vision_model_reads(path: str, kind: str) -> None:
    reply, prompt, _ = await post(path, **asked(path, {"type": kind}))
    assert reply.status_code == 200, reply.text
    assert "omitted: this model reads text and images only]" in tokenizer().decode(prompt)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_a_text_model_is_not_asked_about_an_image_alone(path: str, form: str) -> None:
    reply, prompt, _ = await post(path, sees=False, **asked(path, FORMS[form], text=""))
    assert reply.status_code == 400 and not prompt and "reads text only" in reply.text
    reply, prompt, _ = await post(path, sees=False, **asked(path, FORMS[form], text=" "))
    assert reply.status_code == 400 and not prompt
    for fields in (asked(path, FORMS[form]), answered(path, FORMS[form])):
        reply, prompt, _ = await post(path, sees=False, **fields)
        assert reply.status_code == 200, reply.text
        assert "omitted: this model reads text only]" in tokenizer().decode(prompt)


async def test_a_text_beside_an_image_may_be_a_message_of_its_own() -> None:
    picture = {"role": "user", "content": [FORMS["OpenAI's chats"]]}
    for messages in (
        [picture, {"role": "user", "content": "What is it?"}],
        [{"role": "user", "content": "?"}, picture],
    ):
        assert (await post(CHAT, sees=False, messages=messages))[0].status_code == 200
    assert (await post(CHAT, sees=False, messages=[picture, picture]))[0].status_code == 400


async def test_ollama_refuses_an_image_alone_for_a_text_model() -> None:
    message = {"role": "user", "content": "", "images": [BASE64]}
    assert (await post(OLLAMA, sees=False, messages=[message]))[0].status_code == 400
    assert (await post(OLLAMA, sees=False, messages=[{**message, "content": "a"}]))[0].status_code == 200
    assert (await post(OLLAMA, sees=True, messages=[message]))[0].status_code == 200
