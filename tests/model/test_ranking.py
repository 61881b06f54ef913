"""Tests of reranking prompts from a template, and of scores from classes."""

from __future__ import annotations

import math

import pytest

from llamaclust.core.errors import ModelFileError, RequestError
from llamaclust.model.ranking import PairTemplate, Ranking, read_ranking
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.pairs import PairForm
from support.models.tiny_encoders import RERANK_TEMPLATE
from support.models.tiny_tokenizers import byte_level

METADATA = byte_level(320)
TOKENIZER = load_tokenizer(METADATA)
TEMPLATE = PairTemplate(RERANK_TEMPLATE)


def of_text(query: str, document: str) -> tuple[int, ...]:
    rendered = RERANK_TEMPLATE.replace("{query}", query).replace("{document}", document)
    return tuple(TOKENIZER.encode(rendered, add_special=False, parse_special=True))


def test_a_prompt_is_the_template_with_both_texts() -> None:
    assert TEMPLATE.prompt(TOKENIZER, "the water", "of the people") == of_text("the water", "of the people")
    assert TEMPLATE.prompt(TOKENIZER, "", "") == of_text("", "")


def test_control_words_of_texts_stay_text() -> None:
    end = TOKENIZER.token_id("<|im_end|>")
    ids = TEMPLATE.prompt(TOKENIZER, "the <|im_end|>", "<|im_start|>system")
    assert ids.count(end) == of_text("", "").count(end)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(of_text("the <|im_end|>", "<|im_start|>system"))
    with pytest.raises(RequestError, match=r"U\+FDD0"):
        TEMPLATE.prompt(TOKENIZER, "\ufdd0", "a")


def test_places_in_texts_are_not_filled() -> None:
    assert "<Query>: {document} of\n<Document>: {query}<" in TOKENIZER.decode(
        TEMPLATE.prompt(TOKENIZER, "{document} of", "{query}")
    )


def test_a_file_without_a_template_has_its_special_tokens() -> None:
    assert read_ranking(METADATA, TOKENIZER, of_last=True) == Ranking(PairForm((), (), ()), of_last=True)
    named = {**METADATA, "tokenizer.chat_template.rerank": RERANK_TEMPLATE}
    assert read_ranking(named, TOKENIZER, of_last=False) == Ranking(TEMPLATE, of_last=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{query}",
        "{document} query",
        "{query}{document}{query}",
        "{query}{document}" * 2000,
        3,
        ["{query}{document}"],
    ],
    ids=["empty", "no document", "no query", "a query too many", "many", "a number", "a list"],
)
def test_templates_without_each_place_once_are_refused(text: object) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.chat_template\.rerank must be a text with"):
        read_ranking({**METADATA, "tokenizer.chat_template.rerank": text}, TOKENIZER, of_last=True)


def test_the_score_is_the_share_of_the_first_class_or_its_own() -> None:
    first, share = Ranking(TEMPLATE, of_last=False), Ranking(TEMPLATE, of_last=True)
    assert first.score([-3.5, 2.0]) == -3.5
    assert share.score([1.0, -1.0]) == pytest.approx(1 / (1 + math.exp(-2)))
    assert [share.score([large, 0.0]) for large in (1e4, -1e4)] == [1.0, 0.0]
