"""Tests of WordPiece: words, accents, punctuation, unknown words."""

from __future__ import annotations

import pytest

from llamaclust.core.errors import RequestError
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.models.tiny_tokenizers import word_pieces

CLS, SEP, UNKNOWN = 2, 3, 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(word_pieces(320))


def shown(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token) for token in tokenizer.encode(text, add_special=False)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the man", ["▁the", "▁m", "a", "n"]),
        ("The WATER", ["▁the", "▁water"]),
        ("thère", ["▁there"]),
        ("they.were", ["▁they", "▁.", "▁were"]),
        ("  the\n\tof ", ["▁the", "▁of"]),
        ("thex", ["▁the", "x"]),
        ("the 日本 of", ["▁the", "[UNK]", "[UNK]", "▁of"]),
        ("the 7x of", ["▁the", "[UNK]", "▁of"]),
        ("the\0\ufffd\u200b of", ["▁the", "▁of"]),
        ("", []),
    ],
)
def test_pieces(tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    assert shown(tokenizer, text) == pieces


def test_a_text_is_between_cls_and_sep(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the")
    assert (ids[0], ids[-1], len(ids)) == (CLS, SEP, 3)
    assert tokenizer.decode(tokenizer.encode("the water.", add_special=False)) == "the water ."


def test_case_and_accents_stay_where_the_file_says_so() -> None:
    kept = load_tokenizer(
        {
            **word_pieces(320),
            "tokenizer.ggml.normalizer.lowercase": False,
            "tokenizer.ggml.normalizer.strip_accents": False,
        }
    )
    assert shown(kept, "The thère the") == ["[UNK]", "[UNK]", "▁the"]
    cased = load_tokenizer({**word_pieces(320), "tokenizer.ggml.normalizer.lowercase": False})
    assert shown(cased, "The thère the") == ["[UNK]", "[UNK]", "▁the"]


def test_a_long_word_takes_time_by_its_length(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("e" * 100_000, add_special=False)) == 100_000


@pytest.mark.parametrize("text", ["e" * 262_145, "the [SEP]" * 30_000])
def test_a_text_that_would_take_python_too_long_is_refused(text: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=f"the text has {len(text)} characters; the limit is 262144"):
        tokenizer.encode(text, parse_special=True)
