"""Tests of prompts of a query and a document with the special tokens that vocabularies declare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.pairs import PairForm, read_pair_form
from support.models.tiny_tokenizers import byte_level, unigrams, word_pieces

BOS, EOS, SEP = 5, 6, 7


def form(metadata: dict[str, Any], **keys: Any) -> PairForm:
    named = {**metadata, **{f"tokenizer.ggml.{name}": value for name, value in keys.items()}}
    return read_pair_form(named, load_tokenizer(named))


def test_word_pieces_have_one_separator_and_no_end() -> None:
    assert form(word_pieces(320)) == PairForm((2,), (3,), ())


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, PairForm((), (), ())),
        ({"add_bos_token": True, "add_eos_token": True}, PairForm((BOS,), (EOS,), (EOS,))),
        ({"pre": "jina-v1-en", "add_bos_token": True}, PairForm((BOS,), (SEP,), ())),
        ({"add_eos_token": True, "add_sep_token": True}, PairForm((), (EOS, SEP), (EOS,))),
    ],
)
def test_flags_of_byte_pairs(keys: dict[str, Any], wanted: PairForm) -> None:
    assert form(byte_level(320), bos_token_id=BOS, eos_token_id=EOS, seperator_token_id=SEP, **keys) == wanted


def test_a_pre_tokenizer_that_is_not_text_is_ignored() -> None:
    assert form(unigrams(320), pre=np.array([1, 2], np.uint32)) == form(unigrams(320))


def test_a_separator_that_the_file_does_not_name_is_refused() -> None:
    with pytest.raises(ModelFileError, match="seperator_token_id is missing"):
        form(byte_level(320), add_sep_token=True)


def test_a_prompt_is_both_texts_between_the_special_tokens() -> None:
    pair = PairForm((BOS,), (EOS, SEP), (EOS,))
    assert pair.prompt([1, 2], [3]) == (BOS, 1, 2, EOS, SEP, 3, EOS)
    assert len(pair.prompt([], [])) == pair.length
