"""Blocks of encoders: sentence embedding, norms after residual sums, and a classifier or dense layers at the end."""

from __future__ import annotations

from collections.abc import Iterator

from llamaclust.model import program as steps
from llamaclust.model.architectures.experts import ExpertsVariant
from llamaclust.model.architectures.layers import EMBEDDING, AttentionVariant, ProgramBuilder
from llamaclust.model.pooling import Pooling, read_pooling
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction, ExpertOptions

_TYPES = "token_types.weight"


class EncoderBuilder(ProgramBuilder):
    def sentence_layers(self, *, positions: bool = False, last_norm: bool = False) -> Iterator[int]:
        """Yields the stage's layer numbers. Before layer 0, appends the embedding and its norm. After the last layer,
        appends a norm if `last_norm`. If `positions`, the embedding includes learned positions."""
        if self.stage.start == 0:
            self._embed_sentence(positions)
        yield from self.stage
        self._end(last_norm)

    def scaled_layers(self, embedding_factor: float) -> Iterator[int]:
        self._embed(embedding_factor, positions=False)
        yield from self.stage
        self._end(last_norm=True)

    def encode(
        self,
        layer: int,
        variant: AttentionVariant,
        *,
        gated: bool,
        activation: ActivationFunction,
        experts: bool = False,
    ) -> None:
        """Appends a layer: attention and a feed-forward network, with a norm after each residual sum. If `gated`, the
        network has a gate, which is `ffn_gate` or the first half of `ffn_up`'s rows. If `experts`, a mixture of ungated
        experts replaces the network."""
        prefix = f"blk.{layer}"
        self._normed = self._hidden  # Matrix products read `_normed`, and here no norm precedes them.
        self._attend(layer, variant)
        self._add_and_norm(f"{prefix}.attn_output_norm")
        if experts:
            self._mix_experts(prefix, ExpertsVariant(ExpertOptions(normalized=False, activation=activation)))
        elif gated:
            self._gated_inner(layer, activation, fused=not self.has(f"{prefix}.ffn_gate.weight"))
        else:
            self._plain_inner(layer, activation)
        self._add_and_norm(f"{prefix}.layer_output_norm")

    def attention_without_norm(self, layer: int, variant: AttentionVariant) -> None:
        normed, self._normed = self._normed, self._hidden
        self._attend(layer, variant)
        self._normed = normed
        self._add_projected()

    def _embed_sentence(self, positions: bool) -> None:
        hp, width = self.hyperparameters, self._hidden.width
        embedded, typed, placed = (Buffer(name, width) for name in ("embedded", "typed", "placed"))
        self._steps.append(steps.Embed(embedded, self.weight(EMBEDDING, (hp.vocabulary_size, width))))
        if _TYPES in self.model.tensors:
            rows = self.model.tensor(_TYPES).shape[0]
            self._steps.append(steps.AddRow(embedded, typed, self.weight(_TYPES, (rows, width)), 0))
            embedded = typed
        if positions:
            self._add_positions(embedded, placed)
            embedded = placed
        self._norm("token_embd_norm", embedded, self._hidden)

    def _add_and_norm(self, name: str) -> None:
        summed = Buffer("summed", self._hidden.width)
        self._steps.append(steps.Add(self._hidden, self._projected, summed))
        self._norm(name, summed, self._hidden)

    def _end(self, last_norm: bool) -> None:
        if self.stage.stop < self.hyperparameters.block_count:
            return
        rows = self._hidden
        if last_norm:
            rows = self._last_normed
            self._norm("output_norm", self._hidden, rows)
        self._last_normed = self._scores(rows) if read_pooling(self.model) is Pooling.RANK else self._dense(rows)
        self.out = Buffer("selected", self._hidden.width)
        self._steps.append(steps.SelectRows(self._hidden, self.out))

    def _scores(self, rows: Buffer) -> Buffer:
        self._refuse_mean_of_classifier()
        scores = rows
        for name in [name for name in ("cls", "cls.output") if f"{name}.weight" in self.model.tensors] or ["cls"]:
            x, scores = scores, Buffer(name, self.model.tensor(f"{name}.weight").shape[0])
            self._matmul(name, x, scores)
            if name == "cls":
                self._activate_classifier(scores)
        return scores

    def _activate_classifier(self, scores: Buffer) -> None:
        if self.hyperparameters.architecture != "modern-bert":
            self._steps.append(steps.SoftCap(scores, scores, 1.0))
            return
        self._steps.append(steps.Activate(scores, scores, ActivationFunction.GELU_ERF))
        self._norm("cls.norm", scores, scores)

    def _refuse_mean_of_classifier(self) -> None:
        key, pools_mean = "classifier.pooling_type", self.hyperparameters.architecture == "modern-bert"
        if self.keys.count(key, 1 if pools_mean else 2, minimum=0, maximum=4) != 2:
            raise self.keys.error(key, "expected 2 (cls); a classifier with mean pooling is not supported")

    def _dense(self, rows: Buffer) -> Buffer:
        """Appends the model's dense layers. They are linear, so mean pooling may come before or after them."""
        if not any(f"dense_{number}.weight" in self.model.tensors for number in (2, 3)):
            return rows
        inner = Buffer("dense", self.model.tensor("dense_2.weight").shape[0])
        out = Buffer("dense embedding", rows.width)
        sizes = {"dense_2_feat_in": rows, "dense_2_feat_out": inner, "dense_3_feat_in": inner, "dense_3_feat_out": out}
        for key, buffer in sizes.items():
            if self.keys.has(key) and self.keys.count(key, maximum=1 << 20) != buffer.width:
                raise self.keys.error(key, f"expected {buffer.width}, found {self.keys.count(key, maximum=1 << 20)}")
        self._matmul("dense_2", rows, inner)
        self._matmul("dense_3", inner, out)
        return out
