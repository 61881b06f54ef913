"""The program of an MTP head (`nextn_predict_layers`): a projection of its inputs, a layer, and the logits.

The row of position p reads the normed hidden state of position p and the token at p + 1. Its logits are for the token
at p + 2. Its keys and values are stored at position p in KV memory of the head's layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llamaclust.core.errors import UsageError
from llamaclust.model import program as steps
from llamaclust.model.architectures import ARCHITECTURES
from llamaclust.model.architectures.encoder_layers import EncoderBuilder
from llamaclust.model.architectures.layers import EMBEDDING
from llamaclust.model.kv_type import KvType
from llamaclust.model.model_keys import ModelKeys, hyperparameters_of
from llamaclust.model.program import Buffer, Program

if TYPE_CHECKING:
    from llamaclust.model.loader import Model

FAMILIES: Final = ("deepseek2", "glm4moe", "qwen35", "qwen35moe")
"""Architectures whose MTP heads are supported."""


def has_nextn(model: Model) -> bool:
    return model.hyperparameters.architecture in FAMILIES and _projection(model.layer_count) in model.file.tensors


def check_nextn(model: Model) -> None:
    if not has_nextn(model):
        known = f"supported are {', '.join(FAMILIES)} files with nextn tensors"
        raise UsageError(f"{model.file.path} has no head for multi-token prediction (MTP): {known}; remove `mtp`")


def nextn_program(model: Model, kv_type: KvType = KvType.F16, context_tokens: int | None = None) -> Program:
    """Returns the program of MTP head 0. Raises UsageError if the model has none, and ModelFileError for invalid
    tensors."""
    check_nextn(model)
    builder = _NextnBuilder(ModelKeys(model.file), kv_type, context_tokens)
    ARCHITECTURES[model.hyperparameters.architecture](builder)
    return builder.program()


def _projection(layer: int) -> str:
    return f"blk.{layer}.nextn.eh_proj.weight"


class _NextnBuilder(EncoderBuilder):
    def __init__(self, keys: ModelKeys, kv_type: KvType, context_tokens: int | None) -> None:
        of_layers = hyperparameters_of(keys)
        layer = of_layers.block_count
        own = replace(
            of_layers,
            block_count=layer + 1,
            feed_forward_lengths=(*of_layers.feed_forward_lengths, of_layers.feed_forward_lengths[-1]),
            head_counts_kv=(*of_layers.head_counts_kv, of_layers.head_counts_kv[-1]),
        )
        super().__init__(keys, own, layer, layer + 1, kv_type, context_tokens)
        self._prefix = f"blk.{layer}.nextn"
        self.given = Buffer("hidden before", own.embedding_length)

    def layers(
        self,
        embedding_factor: float = 1.0,
        *,
        positions: bool = False,
        soft_cap: float | None = None,
        may_rank: bool = False,
        logit_factor: float = 1.0,
    ) -> Iterator[int]:
        assert (embedding_factor, positions, soft_cap, logit_factor) == (1.0, False, None, 1.0), "of no family"
        self._project_inputs()
        yield from self.stage
        norm = f"{self._prefix}.shared_head_norm"
        self._norm(norm if self.has(f"{norm}.weight") else self.last_norm, self._hidden, self._last_normed)
        self._further_logits()

    def _project_inputs(self) -> None:
        width, prefix = self._hidden.width, self._prefix
        shape = (self.hyperparameters.vocabulary_size, width)
        embedded, before = Buffer("embedded", width), Buffer("normed before", width)
        joined = Buffer("embedded+before", 2 * width)
        weight = self._first_of(f"{prefix}.embed_tokens.weight", EMBEDDING)
        self.append([steps.Embed(embedded, self.weight(weight, shape))])
        self._rms_norm(f"{prefix}.enorm", embedded, embedded)
        self._rms_norm(f"{prefix}.hnorm", self.given, before)
        self.append([steps.Join(embedded, before, joined)])
        self._matmul(f"{prefix}.eh_proj", joined, self._hidden)

    def _further_logits(self) -> None:
        self.out = Buffer(steps.LOGITS, self.hyperparameters.vocabulary_size)
        selected = Buffer("selected", self._hidden.width)
        self.append([steps.SelectRows(self._last_normed, selected)])
        weight = self._first_of(f"{self._prefix}.shared_head_head.weight", "output.weight", EMBEDDING)
        self._matmul(weight.removesuffix(".weight"), selected, self.out)

    def _first_of(self, *names: str) -> str:
        return next((name for name in names if self.has(name)), names[-1])
