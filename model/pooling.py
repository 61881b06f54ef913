"""The pooling of a prompt's hidden states into an embedding, and its key in model files."""

from __future__ import annotations

from enum import StrEnum

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.hyperparameters import ModelKeys


class Pooling(StrEnum):
    """The pooled rows: each row, their mean, the first row, the last row, or (in encoders) the first row's scores."""

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
"""The default pooling. With causal attention, only the last token has seen the whole prompt."""


_CLASSIFIER = frozenset({"cls.weight", "cls.output.weight"})
"""Tensors that only rerankers have. Most rerankers have no pooling key, because llama.cpp has an option for it."""


def read_pooling(model: ModelFile, default: Pooling = DEFAULT) -> Pooling:
    """Returns the file's pooling. Without the key, returns RANK if the file has a classifier, otherwise the default.
    Raises ModelFileError if the number is unknown."""
    keys = ModelKeys(model)
    if not keys.has("pooling_type") and not _CLASSIFIER.isdisjoint(model.tensors):
        return Pooling.RANK
    number = keys.count("pooling_type", _BY_NUMBER.index(default), minimum=0, maximum=len(_BY_NUMBER) - 1)
    return _BY_NUMBER[number]
