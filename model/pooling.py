"""The pooling, which makes an embedding from a prompt's hidden states, and its metadata key."""

from __future__ import annotations

from enum import StrEnum

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.model_keys import ModelKeys


class Pooling(StrEnum):
    """The rows that make an embedding: all rows separately (NONE), the mean of all rows (MEAN), the first row (CLS) or
    the last row (LAST). RANK is for rerankers, and uses an encoder's first row."""

    NONE = "none"
    MEAN = "mean"
    CLS = "cls"
    LAST = "last"
    RANK = "rank"

    def rows(self, tokens: int) -> tuple[int, int]:
        match self:
            case Pooling.CLS | Pooling.RANK:
                return 0, 1
            case Pooling.LAST:
                return tokens - 1, tokens
            case _:
                return 0, tokens

    def vectors(self, tokens: int) -> int:
        return tokens if self is Pooling.NONE else 1


_BY_NUMBER = (Pooling.NONE, Pooling.MEAN, Pooling.CLS, Pooling.LAST, Pooling.RANK)

DEFAULT = Pooling.LAST
"""The default pooling of causal models, because only the last token attends to the whole prompt."""


_CLASSIFIER = frozenset({"cls.weight", "cls.output.weight"})
"""Tensors that only rerankers have. Most rerankers have no pooling key, because llama.cpp has an option instead."""


def read_pooling(model: ModelFile, default: Pooling = DEFAULT) -> Pooling:
    """Returns the file's pooling. Without a pooling key, returns RANK if the file has a classifier, and otherwise
    `default`. Raises ModelFileError if the key's number is unknown."""
    keys = ModelKeys(model)
    if not keys.has("pooling_type") and not _CLASSIFIER.isdisjoint(model.tensors):
        return Pooling.RANK
    number = keys.count("pooling_type", _BY_NUMBER.index(default), minimum=0, maximum=len(_BY_NUMBER) - 1)
    return _BY_NUMBER[number]
