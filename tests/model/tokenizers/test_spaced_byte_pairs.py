"""Tests of made-up vocabularies like Gemma 4's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.loading import load_tokenizer
from support.models.tiny_tokenizers import spaced_byte_pairs

TEXTS = {
    "": [],
    "▁the cat": ["▁the", "▁ca", "t"],
    " the  the": ["▁the", "▁", "▁the"],
    " the\n\n\n the": ["▁the", "\n\n", "\n", "▁the"],
    "é▁": ["<0xC3>", "<0xA9>", "▁"],
    "<bos>": ["<0x3C>", "b", "o", "s", "<0x3E>"],
    "<|tool> the": ["<|tool>", "▁the"],
}
"""Texts and llama.cpp's tokens of them."""


def words_of(text: str, *, parse_special: bool = False) -> list[str]:
    tokenizer = load_tokenizer(spaced_byte_pairs(400))
    first, *ids = tokenizer.encode(text, parse_special=parse_special)
    assert first == tokenizer.bos_id
    return [tokenizer.token_text(token_id) for token_id in ids]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_merged_by_rank(text: str) -> None:
    assert words_of(text) == TEXTS[text]


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text])
def test_decoding_gives_the_text_again(text: str) -> None:
    tokenizer = load_tokenizer(spaced_byte_pairs(400))
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_control_words_are_tokens_where_they_are_parsed() -> None:
    assert words_of(" the<turn|>", parse_special=True) == ["▁the", "<turn|>"]
    assert "<turn|>" not in words_of(" the<turn|>")


def test_turns_and_tool_responses_end_an_answer() -> None:
    tokenizer = load_tokenizer(spaced_byte_pairs(400))
    assert {tokenizer.token_text(i) for i in tokenizer.end_of_generation} == {"<eos>", "<turn|>"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_type": np.ones(400, np.int32)}, "expected 256 byte tokens, found 0"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["the"]}, "not two words separated by a space"),
    ],
)
def test_damaged_vocabularies_are_refused(changes: dict[str, Any], message: str) -> None:
    metadata = spaced_byte_pairs(400) | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(ModelFileError, match=message):
        load_tokenizer(metadata)
