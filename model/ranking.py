"""Ranks documents: makes the prompt for a query and a document, and computes the score from the model's results."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.chat.prompt import guard_messages, unguarded
from llamaclust.model.pooling import Pooling
from llamaclust.model.tokenizers.pairs import PairForm, read_pair_form
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_KEY: Final = "tokenizer.chat_template.rerank"
_FIELDS: Final = ("query", "document")
_PLACES: Final = re.compile("|".join(rf"\{{{field}\}}" for field in _FIELDS))
_EACH_ONCE: Final = sorted(f"{{{field}}}" for field in _FIELDS)


@dataclass(frozen=True, slots=True)
class PairTemplate:
    text: str

    def prompt(self, tokenizer: Tokenizer, query: str, document: str) -> tuple[int, ...]:
        """Returns the prompt's token ids for a query and a document. Raises RequestError if a text contains U+FDD0."""
        (texts,) = guard_messages([dict(zip(_FIELDS, (query, document), strict=True))], tokenizer)
        rendered = _PLACES.sub(lambda place: str(texts[place[0][1:-1]]), self.text)
        parts = tokenizer.split_special(rendered, parse_special=True)
        return tuple(tokenizer.encode_parts([unguarded(part) if isinstance(part, str) else part for part in parts]))


@dataclass(frozen=True, slots=True)
class Ranking:
    """A reranker's prompts and score. `of_last` is true for causal models, whose last token gives the score."""

    prompts: PairForm | PairTemplate
    of_last: bool

    @property
    def pooling(self) -> Pooling:
        return Pooling.LAST if self.of_last else Pooling.CLS

    def score(self, classes: Sequence[float]) -> float:
        if not self.of_last:
            return classes[0]
        greatest = max(classes)
        return float(np.float32(math.exp(classes[0] - greatest) / math.fsum(math.exp(x - greatest) for x in classes)))


def read_ranking(metadata: Mapping[str, Any], tokenizer: Tokenizer, *, of_last: bool) -> Ranking:
    """Reads the form of a reranker's prompts: the file's template or, if there is none, special tokens around the
    texts. Raises ModelFileError if the template is invalid."""
    text = metadata.get(_KEY)
    if text is None:
        return Ranking(read_pair_form(metadata, tokenizer), of_last)
    if not isinstance(text, str) or sorted(_PLACES.findall(text)) != _EACH_ONCE:
        raise ModelFileError(f"{_KEY} must be a text with {{query}} and {{document}}, each once")
    return Ranking(PairTemplate(text), of_last)
