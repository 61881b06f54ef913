"""Tests Python clients' requests with images. Weights are random: answers differ by image but have no meaning."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAACgAAAAeAQMAAABkE86eAAAABlBMVEXcKB4UPMh8jxkjAAAAFklEQVR42mNgYOD//5+JgYGBgWGokAB9JwJIyoDJ"
    "ugAAAABJRU5ErkJggg=="
)
WEBP = "UklGRjQAAABXRUJQVlA4TCcAAAAvJ0AHACCTtvFZ7dUzdm7fFfSHov9kkzZJuvcOC2Kw+3LH7I7hzDMA"
SVG = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>").decode()
LEAST_ROWS = 16
TEXT = "What is this?"
FEW = {"num_predict": 8}


def url(data: str, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{data}"


def image_url(data: str, kind: str = "png", **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data, kind), **more}}


def chat(*parts: Any) -> Any:
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


def block(data: str, kind: str = "png") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": f"image/{kind}", "data": data}}


@pytest.fixture
def openai_client(api: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def anthropic_client(api: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=api, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def ollama_client(api: str) -> ollama.Client:
    return ollama.Client(host=api)


def test_openai_chat(openai_client: openai.OpenAI, model: str) -> None:
    create = openai_client.chat.completions.create
    contents = ((TEXT,), (TEXT, image_url(PNG)), (TEXT, image_url(WEBP, "webp")), (TEXT, image_url(PNG)))
    options: Any = {"model": model, "logprobs": True, "max_tokens": 8}
    text, first, second, again = (create(messages=chat(*parts), **options) for parts in contents)
    assert text.usage and first.usage and first.usage.prompt_tokens >= text.usage.prompt_tokens + LEAST_ROWS
    assert first.choices[0].logprobs == again.choices[0].logprobs != second.choices[0].logprobs


def test_openai_chat_with_two_images(openai_client: openai.OpenAI, model: str) -> None:
    create = openai_client.chat.completions.create
    one = create(model=model, messages=chat(image_url(PNG), TEXT), max_tokens=8)
    two = create(model=model, messages=chat(image_url(PNG), "or", image_url(WEBP, "webp"), TEXT), max_tokens=8)
    assert one.usage and two.usage and two.usage.prompt_tokens >= one.usage.prompt_tokens + LEAST_ROWS


def test_openai_stream(openai_client: openai.OpenAI, model: str) -> None:
    body: Any = {"model": model, "messages": chat(TEXT, image_url(PNG)), "max_tokens": 8}
    whole = openai_client.chat.completions.create(**body)
    chunks = [*openai_client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage and whole.usage and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_openai_detail(openai_client: openai.OpenAI, model: str, detail: str) -> None:
    messages = chat(TEXT, image_url(PNG, detail=detail))
    reply = openai_client.chat.completions.create(model=model, messages=messages, max_tokens=4)
    assert reply.usage and reply.usage.prompt_tokens > LEAST_ROWS


def response_input(*images: str) -> Any:
    parts = [{"type": "input_image", "image_url": image, "detail": "auto"} for image in images]
    return [{"role": "user", "content": [{"type": "input_text", "text": TEXT}, *parts]}]


def test_openai_responses(openai_client: openai.OpenAI, model: str) -> None:
    body: Any = {"model": model, "input": response_input(url(PNG), url(WEBP, "webp")), "max_output_tokens": 16}
    reply = openai_client.responses.create(**body)
    assert reply.usage and reply.usage.input_tokens > 2 * LEAST_ROWS and reply.usage.output_tokens > 0
    with openai_client.responses.stream(**body) as stream:
        streamed = [*stream][-1].response
    assert streamed.output_text == reply.output_text
    counted = openai_client.responses.input_tokens.count(model=model, input=body["input"])
    assert counted.input_tokens == reply.usage.input_tokens


def test_openai_result_of_a_tool(openai_client: openai.OpenAI, model: str) -> None:
    result = [{"type": "input_image", "image_url": url(PNG), "detail": "auto"}]
    items: Any = [
        {"role": "user", "content": TEXT},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": result},
    ]
    reply = openai_client.responses.create(model=model, input=items, max_output_tokens=16)
    assert reply.usage and reply.usage.input_tokens > LEAST_ROWS


@pytest.mark.parametrize(
    "image",
    [url(SVG, "svg+xml"), url(SVG), url(PNG[:60]), url("%%%%"), "https://example.com/a.png", "file:///etc/passwd"],
    ids=["svg", "wrong type", "cut", "no base64", "host", "file"],
)
def test_openai_refusals(openai_client: openai.OpenAI, model: str, image: str) -> None:
    messages = chat(TEXT, {"type": "image_url", "image_url": {"url": image}})
    with pytest.raises(openai.BadRequestError) as error:
        openai_client.chat.completions.create(model=model, messages=messages, max_tokens=4)
    assert "\n" not in error.value.message


def test_anthropic_messages(anthropic_client: anthropic.Anthropic, model: str) -> None:
    body: Any = {"model": model, "messages": chat(block(PNG), "or", block(WEBP, "webp"), TEXT)}
    reply = anthropic_client.messages.create(**body, max_tokens=8)
    with anthropic_client.messages.stream(**body, max_tokens=8) as stream:
        assert "".join(stream.text_stream) == "".join(part.text for part in reply.content if part.type == "text")
    counted = anthropic_client.messages.count_tokens(**body).input_tokens
    assert counted > 2 * LEAST_ROWS
    assert reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0) == counted


def test_anthropic_result_of_a_tool(anthropic_client: anthropic.Anthropic, model: str) -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "Seen:"}, block(PNG)]}
    messages: Any = [
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}]},
        {"role": "user", "content": [result]},
    ]
    tools: Any = [{"name": "look", "description": "Looks", "input_schema": {"type": "object", "properties": {}}}]
    body: Any = {"model": model, "messages": messages, "tools": tools}
    assert anthropic_client.messages.count_tokens(**body).input_tokens > LEAST_ROWS
    assert anthropic_client.messages.create(**body, max_tokens=4).content


@pytest.mark.parametrize(
    "image",
    [block(SVG), block(PNG[:60]), {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}],
    ids=["svg", "cut", "host"],
)
def test_anthropic_refusals(anthropic_client: anthropic.Anthropic, model: str, image: Any) -> None:
    with pytest.raises(anthropic.BadRequestError):
        anthropic_client.messages.create(model=model, messages=chat(image, TEXT), max_tokens=4)


@pytest.mark.parametrize("form", ["bytes", "base64", "path"])
def test_ollama_chat(ollama_client: ollama.Client, model: str, form: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(base64.b64decode(PNG))
    image = {"bytes": file.read_bytes(), "base64": PNG, "path": file}[form]
    messages = [{"role": "user", "content": TEXT, "images": [image]}]
    reply = ollama_client.chat(model=model, messages=messages, options=FEW)
    assert (reply.prompt_eval_count or 0) > LEAST_ROWS
    parts = [*ollama_client.chat(model=model, messages=messages, options=FEW, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == reply.message.content


def test_ollama_generate(ollama_client: ollama.Client, model: str) -> None:
    one, two = (
        ollama_client.generate(model=model, prompt=TEXT, images=images, options=FEW)
        for images in ([PNG], [base64.b64decode(PNG), WEBP])
    )
    assert (two.prompt_eval_count or 0) >= (one.prompt_eval_count or 0) + LEAST_ROWS


def test_ollama_show(ollama_client: ollama.Client, model: str) -> None:
    assert "vision" in (ollama_client.show(model).capabilities or [])


def test_ollama_refusals(ollama_client: ollama.Client, model: str) -> None:
    with pytest.raises(ollama.ResponseError) as error:
        ollama_client.generate(model=model, prompt=TEXT, images=[base64.b64decode(SVG)], options=FEW)
    assert error.value.status_code == 400


@pytest.mark.parametrize("uses_responses", [False, True], ids=["chat", "responses"])
@pytest.mark.parametrize(
    "image", [image_url(PNG), {"type": "image", "base64": PNG, "mime_type": "image/png"}], ids=["url", "base64"]
)
def test_langchain(api: str, model: str, image: dict[str, Any], uses_responses: bool) -> None:
    options: Any = {"model": model, "base_url": f"{api}/v1", "api_key": "none", "max_tokens": 16, "max_retries": 0}
    chat_model = ChatOpenAI(**options, use_responses_api=uses_responses)
    message = HumanMessage([{"type": "text", "text": TEXT}, image])
    reply = chat_model.invoke([message])
    assert reply.usage_metadata is not None and reply.usage_metadata["input_tokens"] > LEAST_ROWS
    assert "".join(part.text for part in chat_model.stream([message])) == reply.text
