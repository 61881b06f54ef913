"""Tests of image parts in all APIs: images that reach the projector and their positions in the prompt."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from llamaclust.cluster.client.http_codec import CHAT
from llamaclust.cluster.client.local import AsyncServiceClient
from llamaclust.cluster.front.body import STRICT_HEADER
from llamaclust.cluster.front.text import images
from llamaclust.cluster.front.text.images import MAX_IMAGES, MEDIA_MARKER, PLAIN_MARKER
from llamaclust.core.errors import ParameterError
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.images.settings import MAX_IMAGE_BYTES
from support.chat.vision import TinyVision, base64_of, data_url, image, laid_out
from support.clusters import served as served_module
from support.clusters.served import MODEL, ScriptedEngine, client, ids, make_app, make_service, says, tokenizer
from support.clusters.tool_chats import TEMPLATE

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
OLLAMA, GENERATE, COMPLETION = "/api/chat", "/api/generate", "/completion"
FIRST, SECOND = image(2, b"first"), image(3, b"second")


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)


async def post(
    path: str, *, answer: str = "Yes.", is_strict: bool = True, **fields: Any
) -> tuple[httpx.Response, tuple[int, ...], TinyVision]:
    """Returns the reply, the engine's prompt and the model's projector."""
    engine, vision = ScriptedEngine(says(answer)), TinyVision()
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with client(make_app(engine, template, vision=vision)) as http:
            more = {STRICT_HEADER: "true"} if is_strict else {}
            reply = await http.post(path, json={"model": MODEL} | fields, headers=more)
    return reply, engine.submitted[0].prompt if engine.submitted else (), vision


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [*parts]}


def text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_url(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data), **more}}


def input_image(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": data_url(data), **more}


def block(data: bytes, media_type: object = "image/png") -> dict[str, Any]:
    source = {"type": "base64", "media_type": media_type, "data": base64_of(data)}
    return {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}


EARLIER = f"<__media_{'0' * 32}__>"  # Media marker of an earlier coordinator, which a restored prompt has.


def document(*blocks: Any) -> dict[str, Any]:
    return {"type": "document", "source": {"type": "content", "content": [*blocks]}}


BOTH: list[tuple[str, dict[str, Any], tuple[str | bytes, ...]]] = [
    (
        CHAT,
        {"messages": [said(text("a"), text("b"), image_url(FIRST), text("c"), image_url(SECOND))]},
        ("<user>a\nb", FIRST, "c", SECOND, "<assistant>"),
    ),
    (
        CHAT,
        {"messages": [said(image_url(FIRST)), said(text("d"), role="assistant"), said(image_url(SECOND), text("e"))]},
        ("<user>", FIRST, "<assistant>d<user>", SECOND, "e<assistant>"),
    ),
    (
        RESPONSES,
        {"input": [said({"type": "input_text", "text": "a"}, input_image(FIRST), input_image(SECOND))]},
        ("<user>a", FIRST, SECOND, "<assistant>"),
    ),
    (
        RESPONSES,
        {
            "input": [
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": [input_image(FIRST)]},
                {"type": "computer_call", "call_id": "d", "action": {"type": "click"}},
                {
                    "type": "computer_call_output",
                    "call_id": "d",
                    "output": {"type": "computer_screenshot", "image_url": data_url(SECOND)},
                },
            ]
        },
        (),
    ),
    (
        MESSAGES,
        {
            "messages": [
                said(text("a"), block(FIRST, "image/png,"), text("b")),
                said(text("c"), block(SECOND, ["a", "b"])),
            ],
            "max_tokens": 9,
        },
        ("<user>a", FIRST, "b\nc", SECOND, "<assistant>"),
    ),
    (
        MESSAGES,
        {
            "max_tokens": 9,
            "messages": [
                said({"type": "tool_use", "id": "a", "name": "look", "input": {}}, role="assistant"),
                said(
                    {"type": "tool_result", "tool_use_id": "a", "content": [text("Seen:"), block(FIRST)]},
                    block(SECOND),
                ),
            ],
        },
        (),
    ),
    (
        MESSAGES,
        {"messages": [said(document(text("a"), block(FIRST)), text("b"), document(block(SECOND)))], "max_tokens": 9},
        ("<user>a", FIRST, "b", SECOND, "<assistant>"),
    ),
    (
        MESSAGES,
        {
            "max_tokens": 9,
            "messages": [
                said({"type": "tool_use", "id": "a", "name": "look", "input": {}}, role="assistant"),
                said({"type": "tool_result", "tool_use_id": "a", "content": [document(block(FIRST), block(SECOND))]}),
            ],
        },
        (),
    ),
    (
        OLLAMA,
        {"messages": [{"role": "user", "content": "a", "images": [base64_of(FIRST), data_url(SECOND)]}]},
        ("<user>", FIRST, SECOND, "a<assistant>"),
    ),
    (
        GENERATE,
        {"prompt": "a", "system": "s", "images": [base64_of(FIRST), base64_of(SECOND)]},
        ("<system>s<user>", FIRST, SECOND, "a<assistant>"),
    ),
    (
        COMPLETION,
        {
            "prompt": {
                "prompt_string": f"a{MEDIA_MARKER}b{MEDIA_MARKER}",
                "multimodal_data": [base64_of(FIRST), base64_of(SECOND)],
            }
        },
        ("a", FIRST, "b", SECOND),
    ),
    (
        COMPLETION,
        {
            "prompt": {
                "prompt_string": f"a{PLAIN_MARKER * 2}b",
                "multimodal_data": [base64_of(FIRST), base64_of(SECOND)],
            }
        },
        ("a", FIRST, SECOND, "b"),
    ),
    (
        COMPLETION,
        {
            "prompt": {
                "prompt_string": f"{EARLIER}a{EARLIER}{PLAIN_MARKER}",
                "multimodal_data": [base64_of(FIRST), base64_of(SECOND)],
            }
        },
        (FIRST, "a", SECOND, PLAIN_MARKER),
    ),
    (
        "/completions",
        {
            "prompt": [{"prompt_string": MEDIA_MARKER * 2, "multimodal_data": [base64_of(FIRST), base64_of(SECOND)]}],
            "model": None,
        },
        (FIRST, SECOND),
    ),
]


@pytest.mark.parametrize(("path", "fields", "pieces"), BOTH)
async def test_images_stand_at_their_places(path: str, fields: dict[str, Any], pieces: tuple[str | bytes, ...]) -> None:
    reply, prompt, vision = await post(path, stream=False, is_strict="computer_call" not in str(fields), **fields)
    assert reply.status_code == 200, reply.text
    assert [source.data for source in vision.images] == [FIRST, SECOND]
    if pieces:
        assert prompt == laid_out(*pieces), tokenizer().decode(prompt)
    assert prompt.count(0) == FIRST[0] + SECOND[0]


USAGE = {
    CHAT: lambda reply: reply["usage"]["prompt_tokens"],
    MESSAGES: lambda reply: reply["usage"]["input_tokens"] + reply["usage"]["cache_read_input_tokens"],
    RESPONSES: lambda reply: reply["usage"]["input_tokens"],
    OLLAMA: lambda reply: reply["prompt_eval_count"],
}


@pytest.mark.parametrize(("path", "fields"), [(path, fields) for path, fields, _ in BOTH if path in USAGE])
async def test_usage_counts_the_rows_of_images(path: str, fields: dict[str, Any]) -> None:
    reply, prompt, _ = await post(path, stream=False, is_strict=False, **fields)
    assert USAGE[path](reply.json()) == len(prompt)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (f"{CHAT}/input_tokens", {"messages": [said(text("a"), image_url(FIRST))]}),
        ("/v1/messages/count_tokens", {"messages": [said(text("a"), block(FIRST))]}),
        (f"{RESPONSES}/input_tokens", {"input": [said({"type": "input_text", "text": "a"}, input_image(FIRST))]}),
    ],
)
async def test_counts_of_tokens(path: str, fields: dict[str, Any]) -> None:
    reply, _, _ = await post(path, **fields)
    assert reply.json()["input_tokens"] == len(laid_out("<user>a", FIRST, "<assistant>"))


async def test_details_reach_the_projector() -> None:
    given = [image_url(FIRST, detail="low"), image_url(FIRST, detail="high"), image_url(FIRST)]
    *_, vision = await post(CHAT, messages=[said(*given)])
    assert [source.detail for source in vision.images] == ["low", "high", "auto"]
    *_, vision = await post(RESPONSES, input=[said(input_image(FIRST, detail=each)) for each in ("high", "original")])
    assert [source.detail for source in vision.images] == ["high", "original"]
    reply, *_ = await post(CHAT, messages=[said(image_url(FIRST, detail="sharp"))])
    assert reply.status_code == 400 and "detail" in reply.text


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": [said(text("a")), said(text("a"), {"type": "image_url"})]}, "messages[1]: content[1]: "),
    (CHAT, {"messages": [said({"type": "image_url", "image_url": "data:,a"})]}, "messages[0]: content[0]: "),
    (CHAT, {"messages": [said({"type": "image_url", "image_url": {"url": "data:;base64,a b="}})]}, "character ' '"),
    (CHAT, {"messages": [said({"type": "image_url", "image_url": {"url": "data:;base64,aGk\né"}})]}, "character 'é'"),
    (CHAT, {"messages": [said({"type": "image_url", "image_url": {"url": "data:;base64,aGkxa"}})]}, "without padding"),
    (CHAT, {"messages": [said({"type": "image_url", "image_url": {"url": "data:;base64,a==="}})]}, "character '='"),
    (CHAT, {"messages": [said({"type": "image_url", "image_url": {"url": "data:;base64,"}})]}, "no bytes"),
    (CHAT, {"messages": [said({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]}, "data URL"),
    (CHAT, {"messages": [said({"type": "image_url", "image_url": {"url": "https://a.example/a"}})]}, "api.image_urls"),
    (RESPONSES, {"input": [said({"type": "input_image", "file_id": "f"})]}, "input: [0]: content[0]: "),
    (MESSAGES, {"messages": [said({"type": "image", "source": {"type": "file"}})]}, "messages[0]: content[0]: source"),
    (MESSAGES, {"messages": [said(text("a"), {"type": "image"})]}, "messages[0]: content[1]: image: "),
    (
        MESSAGES,
        {
            "messages": [
                said(
                    {
                        "type": "tool_result",
                        "tool_use_id": "a",
                        "content": [text("a"), {"type": "image", "source": {"type": "base64", "data": "%%%%"}}],
                    }
                )
            ]
        },
        "messages[0]: content[0]: content[1]: ",
    ),
    (MESSAGES, {"messages": [said(document({"type": "image"}))]}, "messages[0]: content[0]: content[0]: image: "),
    (OLLAMA, {"messages": [{"role": "user", "content": "a", "images": ["aGk=", "?"]}]}, "messages[0]: images[1]: "),
    (OLLAMA, {"messages": [{"role": "user", "content": "a", "images": "aGk="}]}, "messages[0]: images: must be a list"),
    (GENERATE, {"prompt": "a", "images": [5]}, "images[0]: "),
    (GENERATE, {"prompt": "a", "images": ["aGk="], "raw": True}, "images: "),
    (COMPLETION, {"prompt": {"prompt_string": "a", "multimodal_data": ["aGk="]}}, "0 media markers for 1 images"),
    (COMPLETION, {"prompt": {"prompt_string": MEDIA_MARKER, "multimodal_data": ["a"]}}, "prompt.multimodal_data[0]: "),
    (COMPLETION, {"prompt": {"prompt_string": MEDIA_MARKER, "multimodal_data": ["aGk="], "b": 1}}, "no other fields"),
]


@pytest.mark.parametrize(("path", "fields", "named"), WRONG)
async def test_errors_name_the_part(path: str, fields: dict[str, Any], named: str) -> None:
    for is_strict in (True, False):
        reply, prompt, vision = await post(path, is_strict=is_strict, **fields)
        assert reply.status_code == 400 and not prompt and not vision.prompts
        error = reply.json()["error"]
        assert named in (error if isinstance(error, str) else error["message"]), reply.text


async def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    reply, *_ = await post(CHAT, messages=[said(*[image_url(FIRST)] * MAX_IMAGES)])
    assert reply.status_code == 200
    reply, *_ = await post(CHAT, messages=[said(*[image_url(FIRST)] * MAX_IMAGES), said(image_url(FIRST))])
    assert reply.status_code == 400 and f"{MAX_IMAGES} images in one request, found {MAX_IMAGES + 1}" in reply.text
    prompts = [{"prompt_string": MEDIA_MARKER * n, "multimodal_data": [base64_of(FIRST)] * n} for n in (MAX_IMAGES, 1)]
    for prompt in prompts:
        assert (await post(COMPLETION, prompt=prompt))[0].status_code == 200
    reply, *_ = await post(COMPLETION, prompt=prompts)
    assert reply.status_code == 400 and f"{MAX_IMAGES} images in one request, found {MAX_IMAGES + 1}" in reply.text
    monkeypatch.setattr("llamaclust.cluster.front.images.chat_images.MAX_IMAGES_BYTES", 20)
    for path, fields in (
        (CHAT, {"messages": [said(*[image_url(FIRST)] * 4)]}),
        (COMPLETION, {"prompt": prompts[1:] * 4}),
    ):
        reply, *_ = await post(path, **fields)
        assert reply.status_code == 400 and "at most 20 bytes in one request" in reply.text
    monkeypatch.setattr("llamaclust.cluster.front.images.parts.MAX_IMAGE_BYTES", 8)
    reply, *_ = await post(CHAT, messages=[said(image_url(bytes(12)))])
    assert reply.status_code == 400 and "at most 8 bytes, found 12" in reply.text
    assert MAX_IMAGE_BYTES < images.MAX_IMAGES_BYTES


async def test_line_breaks_in_base64() -> None:
    data = image(2, bytes(range(256)) * 4000)
    whole = base64_of(data)
    lines = "\r\n".join(whole[start : start + 76] for start in range(0, len(whole), 76))
    *_, vision = await post(CHAT, messages=[said({"type": "image_url", "image_url": {"url": f"data:;base64,{lines}"}})])
    assert vision.images[0].data == data


async def test_an_image_that_cannot_be_read_is_refused_with_its_error() -> None:
    reply, prompt, _ = await post(CHAT, messages=[said(image_url(image(0)))], stream=True)
    assert reply.status_code == 400 and "no format that is read here" in reply.text and not prompt


async def test_a_prompt_that_is_too_long_with_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 200)
    reply, *_ = await post(CHAT, messages=[said(image_url(image(250)))])
    assert reply.status_code == 400 and "context_length_exceeded" in reply.text


@pytest.mark.parametrize("typed", [MEDIA_MARKER, "image0n0e", "<__media__>"], ids=["marker", "word", "old marker"])
async def test_markers_in_texts_are_texts(typed: str) -> None:
    _, prompt, vision = await post(CHAT, messages=[said(text(typed), image_url(FIRST))])
    assert prompt == laid_out(f"<user>{typed}", FIRST, "<assistant>") and len(vision.images) == 1
    _, prompt, vision = await post(CHAT, messages=[said(text(typed))])
    assert prompt == tuple(ids(f"<user>{typed}<assistant>")) and not vision.prompts


async def test_apply_template_shows_the_media_marker() -> None:
    reply, *_ = await post("/apply-template", messages=[said(text("a"), image_url(FIRST))])
    assert reply.json()["prompt"] == f"<user>a{MEDIA_MARKER}<assistant>"


async def test_generate_gives_no_context_for_images() -> None:
    reply, *_ = await post(GENERATE, prompt="a", images=[base64_of(FIRST)], stream=False)
    assert "context" not in reply.json()
    earlier = ids("<user>x")
    _, prompt, _ = await post(GENERATE, prompt="a", context=earlier, images=[base64_of(FIRST)], stream=False)
    assert prompt == (*earlier, *laid_out("<user>", FIRST, "a<assistant>"))


async def test_a_stored_response_is_continued_with_its_images() -> None:
    engine, vision = ScriptedEngine(says("Yes.")), TinyVision()
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with client(make_app(engine, template, vision=vision)) as http:
            first = (await http.post(RESPONSES, json={"model": MODEL, "input": [said(input_image(FIRST))]})).json()
            items = (await http.get(f"{RESPONSES}/{first['id']}/input_items")).json()["data"]
            more = {"model": MODEL, "input": "And?", "previous_response_id": first["id"]}
            second = await http.post(RESPONSES, json=more)
    assert items[0]["content"] == [{"type": "input_image", "detail": "auto", "image_url": data_url(FIRST)}]
    assert second.status_code == 200, second.text
    assert engine.submitted[1].prompt == laid_out("<user>", FIRST, "<assistant>Yes.<user>And?<assistant>")


async def test_slots_refuse_images(tmp_path: Any) -> None:
    app = make_app(ScriptedEngine(says("a")), vision=TinyVision(), slot_folder=tmp_path)
    prompt = {"prompt_string": MEDIA_MARKER, "multimodal_data": [base64_of(FIRST)]}
    async with client(app) as http:
        reply = await http.post(COMPLETION, json={"prompt": prompt, "id_slot": 1})
    assert reply.status_code == 400 and "id_slot" in reply.text


async def test_the_client_in_this_process() -> None:
    engine, vision = ScriptedEngine(says("Yes.")), TinyVision()
    with ChatTemplate(TEMPLATE, "", "") as template:
        seeing = AsyncServiceClient(make_service(engine, template, vision=vision))
        body = {"messages": [said(text("a"), image_url(FIRST))]}
        assert [chunk async for chunk in seeing.chunks(CHAT, body)]
        blind = AsyncServiceClient(make_service(engine, template))
        with pytest.raises(ParameterError, match="image input is not supported"):
            [chunk async for chunk in blind.chunks(CHAT, body)]
    assert engine.submitted[0].prompt == laid_out("<user>a", FIRST, "<assistant>")


async def test_vision_is_shown() -> None:
    for vision in (TinyVision(), None):
        async with client(make_app(ScriptedEngine(says("a")), vision=vision)) as http:
            models = (await http.get("/v1/models")).json()
            properties = (await http.get("/props")).json()
            shown = (await http.post("/api/show", json={"model": MODEL})).json()
        sees = vision is not None
        assert models["data"][0].get("capabilities") == ({"vision": True} if sees else None)
        assert ("multimodal" in models["models"][0]["capabilities"]) == sees
        assert properties["modalities"] == {"vision": sees, "audio": False}
        assert properties.get("media_marker") == (MEDIA_MARKER if sees else None)
        assert ("vision" in shown["capabilities"]) == sees
