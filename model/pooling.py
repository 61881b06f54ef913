"""How the hidden states of a prompt's tokens become its embedding, and what a model file says about it."""

from __future__ import annotations

from enum import StrEnum

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.hyperparameters import ModelKeys


class Pooling(StrEnum):
    """Which rows: all, one by one; their mean; the first; the last; the first one's scores, of encoders alone."""

    NONE = "none"
    MEAN = "mean"
    CLS = "cls"
    LAST = "last"
    RANK = "rank"

    def rows(self, tokens: int) -> tuple[int, int]:
        """The tokens [first, end) of a prompt whose hidden states it reads."""
        match self:
            case Pooling.CLS | Pooling.RANK:
                return 0, 1
            case Pooling.LAST:
                return tokens - 1, tokens
            case _:
                return 0, tokens

    def vectors(self, tokens: int) -> int:
        """Vectors of the embedding of a prompt."""
        return tokens if self is Pooling.NONE else 1


_BY_NUMBER = (Pooling.NONE, Pooling.MEAN, Pooling.CLS, Pooling.LAST, Pooling.RANK)
"""By the number that GGUF files have."""

DEFAULT = Pooling.LAST
"""Of models that name none: in a model of causal attention, the last token alone has seen the whole prompt."""


_CLASSIFIER = frozenset({"cls.weight", "cls.output.weight"})
"""Tensors that rerankers alone have. Most public ones name no pooling, because llama.cpp has an option for it."""


def read_pooling(model: ModelFile, default: Pooling = DEFAULT) -> Pooling:
    """What the file names; where it names none, rank of a file with a classifier, else the default. ModelFileError for
    another number."""
    keys = ModelKeys(model)
    if not keys.has("pooling_type") and not _CLASSIFIER.isdisjoint(model.tensors):
        return Pooling.RANK
    number = keys.count("pooling_type", _BY_NUMBER.index(default), minimum=0, maximum=len(_BY_NUMBER) - 1)
    return _BY_NUMBER[number]
