"""Checks that several kinds of templates keep the positions of images and that control tokens in texts stay text."""

from __future__ import annotations

import time
from typing import Any

import pytest

from llamaclust.cluster.front.images.chat_images import with_images
from llamaclust.cluster.front.text.chat import ChatFormat
from llamaclust.cluster.front.text.images import (
    PLAIN_MARKER,
    ImageMarkers,
    ImageSource,
    Omission,
    PromptImages,
    image_part,
    media_marker,
    text_part,
)
from llamaclust.cluster.front.text.request import ChatRequest
from llamaclust.core.errors import ParameterError
from llamaclust.model.chat.template import ChatTemplate
from support.chat.vision import data_url, image
from support.clusters.served import tokenizer

FIRST, SECOND = image(2), image(3)
TYPED = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}[{{ part.text }}]{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)
ESCAPED = "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}"


def chat(*parts: dict[str, Any], before: str = "s") -> ChatRequest:
    return ChatRequest(({"role": "system", "content": before}, {"role": "user", "content": [*parts]}))


async def pieces_of(source: str, request: ChatRequest) -> list[str | bytes]:
    """Returns the prompt's texts, in place of token ids, and images."""
    with ChatTemplate(source, "", "") as template:
        completion = await ChatFormat(template, tokenizer()).completion(request, lambda _: None)
    prompt = completion.prompt
    if isinstance(prompt, PromptImages):
        return [piece.data if isinstance(piece, ImageSource) else tokenizer().decode(piece) for piece in prompt.pieces]
    assert not isinstance(prompt, str)
    return [tokenizer().decode(prompt)]


@pytest.mark.parametrize(
    ("source", "pieces"),
    [
        (TYPED, ["<system>s<user>a", FIRST, "b", SECOND]),
        (EITHER, ["<system>s<user>a", FIRST, "b", SECOND]),
        (ESCAPED, ['<system>"s"<user>"a', FIRST, "b", SECOND, '"']),
    ],
)
async def test_kinds_of_templates(source: str, pieces: list[str | bytes]) -> None:
    parts = (text_part("a"), image_part(data_url(FIRST)), text_part("b"), image_part(data_url(SECOND)))
    assert await pieces_of(source, chat(*parts)) == pieces


async def test_a_template_that_reads_only_parts_shows_texts() -> None:
    request = ChatRequest(({"role": "user", "content": "Hello"},))
    assert await pieces_of(TYPED, request) == ["<user>Hello"]
    assert await pieces_of(EITHER, request) == ["<user>Hello"]


async def test_a_template_that_leaves_out_images_is_an_error() -> None:
    source = "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ParameterError, match="leaves out 1 of 1 images"):
        await pieces_of(source, chat(image_part(data_url(FIRST))))


async def test_control_words_beside_images_stay_texts() -> None:
    word, control = "<|im_end|>", tokenizer().token_id("<|im_end|>")
    parts = (text_part(f"{word}<|im_"), image_part(data_url(FIRST)), text_part(f"end|>{word}"))
    with ChatTemplate(EITHER, "", "") as template:
        completion = await ChatFormat(template, tokenizer()).completion(chat(*parts), lambda _: None)
    assert isinstance(completion.prompt, PromptImages)
    first, _, last = completion.prompt.pieces
    assert not isinstance(first, ImageSource) and not isinstance(last, ImageSource)
    assert control not in (*first, *last)
    assert tokenizer().decode(last) == f"end|>{word}"


def test_markers_are_new_for_each_chat() -> None:
    message = {"role": "user", "content": [image_part(data_url(FIRST))]}
    one, other = ImageMarkers(), ImageMarkers()
    (first,), (second,) = one.mark([message]), other.mark([message])
    assert first["content"] != second["content"] and first["content"].isalnum()
    with pytest.raises(ParameterError):
        other.split(first["content"])
    repeated = one.split(first["content"] * 2)
    assert len(repeated) == 3


def test_the_time_for_markers_grows_linearly_with_the_prompt() -> None:
    prompt = "".join(f"<__media_{number:032x}__>" for number in range(20_000))
    start = time.process_time()
    assert media_marker(prompt, 2) == PLAIN_MARKER
    assert time.process_time() - start < 2  # about 0.02 s; 4 s and more if it were quadratic


@pytest.mark.parametrize(("word", "helps"), [("image", True), ("audio", False), ("file", False), ("video", False)])
async def test_another_model_is_advised_only_for_images(word: str, helps: bool) -> None:
    omitted = Omission(f"[{word} omitted: this model reads text only]")
    with pytest.raises(ParameterError, match="add a text") as error:
        await with_images(ChatRequest(({"role": "user", "content": omitted},)))
    assert ("a model that reads images" in str(error.value)) == helps
