"""Blocks from which architectures are built. The builder checks that the file has each weight that a block uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from llamaclust.model import program as steps
from llamaclust.model.architectures.experts import ExpertsVariant, expert_step
from llamaclust.model.architectures.positions import rope_table
from llamaclust.model.architectures.tensors import CheckedTensors
from llamaclust.model.hyperparameters import Hyperparameters, RopeParameters, RopeScaling
from llamaclust.model.kv_type import KvType
from llamaclust.model.model_keys import ModelKeys
from llamaclust.model.pooling import Pooling, read_pooling
from llamaclust.model.program import Buffer, Program, RopeTable
from llamaclust.model.steps.options import ActivationFunction, RopeStyle

EMBEDDING, _POSITIONS = "token_embd.weight", "position_embd.weight"


class HeadNorms(StrEnum):
    """Norms of q and k: over all heads before RoPE (WHOLE), per head before RoPE (PER_HEAD), or per head after RoPE."""

    NONE = "none"
    PER_HEAD = "per head"
    PER_HEAD_AFTER_ROPE = "per head after rope"
    UNIT_AFTER_ROPE = "unit after rope"  # Without weights.
    WHOLE = "whole"


class Norms(StrEnum):
    """The position of a block's norms: before its linear layers, between these and the residual sum, or both."""

    BEFORE = "before"
    AFTER = "after"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class AttentionVariant:
    """Options of an attention block. A `table` of None means no RoPE, and a `scale` of None means 1 / sqrt(head_dim).
    `temperature` has the arguments of the `PositionScale` step for queries."""

    style: RopeStyle = RopeStyle.NEOX
    table: RopeTable | None = None
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    slopes: tuple[float, ...] | None = None
    head_norms: HeadNorms = HeadNorms.NONE
    causal: bool = True
    sinks: bool = False
    temperature: tuple[float, int] | tuple[float, int, int] | None = None
    chunked: bool = False
    sections: tuple[int, ...] | None = None


class ProgramBuilder(CheckedTensors):
    """Builds the program of layers [start, end). Each method appends steps in the order of computation."""

    def __init__(
        self,
        keys: ModelKeys,
        hyperparameters: Hyperparameters,
        start: int,
        end: int,
        kv_type: KvType,
        context_tokens: int | None,
    ) -> None:
        assert 0 <= start < end <= hyperparameters.block_count, (start, end, hyperparameters.block_count)
        super().__init__(keys.model)
        self.hyperparameters = hyperparameters
        self.stage = range(start, end)
        self.keys = keys
        self.kv_type = kv_type
        self._context_tokens = context_tokens or hyperparameters.context_length
        self._steps: list[steps.Step] = []
        width = hyperparameters.embedding_length
        self._hidden = Buffer("hidden", width)
        self._normed = Buffer("normed", width)
        self._projected = Buffer("projected", width)
        self._last_normed = Buffer("last normed", width)
        self.given = self.out = self._hidden  # Buffers that the stage receives and sends.
        self._layer_norm_epsilon: float | None = None
        self._norm_biases = True
        self._residual_scale = 1.0
        self.last_norm = "output_norm"

    def program(self) -> Program:
        layers = self.hyperparameters.block_count
        start, end = self.stage.start, self.stage.stop
        normed = self._last_normed if end == layers else None
        return Program(start, end, layers, self.given, self.out, tuple(self._steps), normed)

    def use_layer_norms(self, *, biases: bool = True) -> None:
        self._norm_biases = biases
        self._layer_norm_epsilon = self.keys.real("attention.layer_norm_epsilon", minimum=1e-13, maximum=0.1)

    def scale_residuals(self, factor: float) -> None:
        self._residual_scale = factor

    def layers(
        self,
        embedding_factor: float = 1.0,
        *,
        positions: bool = False,
        soft_cap: float | None = None,
        may_rank: bool = False,
        logit_factor: float = 1.0,
    ) -> Iterator[int]:
        """Yields the stage's layer numbers. Appends the embedding before the model's first layer, and the head after
        its last layer. If `may_rank` and the file's pooling is RANK, the head is a classifier."""
        self._embed(embedding_factor, positions)
        yield from self.stage
        if self.stage.stop == self.hyperparameters.block_count:
            self._norm(self.last_norm, self._hidden, self._last_normed)
            if may_rank and read_pooling(self.model) is Pooling.RANK:
                self._ranking_head()
            else:
                self._head(soft_cap, logit_factor)

    def _embed(self, factor: float, positions: bool) -> None:
        if self.stage.start > 0:
            return
        hp = self.hyperparameters
        embedded = Buffer("embedded", self._hidden.width) if positions else self._hidden
        shape = (hp.vocabulary_size, hp.embedding_length)
        self._steps.append(steps.Embed(embedded, self.weight(EMBEDDING, shape)))
        if factor != 1.0:
            self._steps.append(steps.Scale(embedded, embedded, factor))
        self._steps.append(steps.GivenRows(embedded, embedded))
        if positions:
            self._add_positions(embedded, self._hidden)

    def _add_positions(self, embedded: Buffer, out: Buffer) -> None:
        hp = self.hyperparameters
        weight = self.weight(_POSITIONS, (hp.context_length, hp.embedding_length))
        if self._context_tokens > hp.context_length:
            what = f"it has {hp.context_length} positions, fewer than the context of {self._context_tokens} tokens"
            raise self.error(_POSITIONS, what, f"set context_length to {hp.context_length} or less")
        self._steps.append(steps.AddPosition(embedded, out, weight))

    def _head(self, soft_cap: float | None, factor: float) -> None:
        """Appends the output head. Uses the token embedding's tensor if the file has no `output.weight`."""
        self.out = Buffer(steps.LOGITS, self.hyperparameters.vocabulary_size)
        selected = Buffer("selected", self._hidden.width)
        self._steps.append(steps.SelectRows(self._last_normed, selected))
        weight = "output" if "output.weight" in self.model.tensors else EMBEDDING.removesuffix(".weight")
        self._matmul(weight, selected, self.out)
        if factor != 1.0:
            self._steps.append(steps.Scale(self.out, self.out, factor))
        if soft_cap is not None:
            self._steps.append(steps.SoftCap(self.out, self.out, soft_cap))

    def _ranking_head(self) -> None:
        name = "cls.output.weight"
        scores = Buffer("scores", self.model.tensor(name).shape[0])
        if scores.width < 2:
            raise self.error(name, "expected 2 classes or more, found 1; the score of a single class is always 1")
        self._matmul("cls.output", self._last_normed, scores)
        self.out = Buffer("selected", self._hidden.width)
        self._steps.append(steps.SelectRows(self._hidden, self.out))
        self._last_normed = scores

    def attention(
        self, layer: int, variant: AttentionVariant = AttentionVariant(), *, norms: Norms = Norms.BEFORE
    ) -> None:
        """Appends hidden += output(attention(rope(q), rope(k), v)). q, k and v read the normed hidden state."""
        prefix = f"blk.{layer}"
        self._norm_before(f"{prefix}.attn_norm", norms)
        self._attend(layer, variant)
        self._add_projected(None if norms is Norms.BEFORE else f"{prefix}.post_attention_norm")

    def _norm_before(self, name: str, norms: Norms) -> None:
        if norms is Norms.AFTER:
            self._normed = self._hidden
        else:
            self._norm(name, self._hidden)

    def parallel(
        self, layer: int, variant: AttentionVariant, activation: ActivationFunction, *, gated: bool = False
    ) -> None:
        """Appends hidden += attention + feed-forward network. Both read the layer's input."""
        prefix, second = f"blk.{layer}", f"blk.{layer}.attn_norm_2"
        two = any(self.has(f"{second}.{part}") for part in ("weight", "bias"))
        self._norm(second if two else f"{prefix}.attn_norm", self._hidden)
        self._attend(layer, variant)
        if two:
            self._norm(f"{prefix}.attn_norm", self._hidden)
        self._add_projected()
        if gated:
            self._gated_inner(layer, activation)
        else:
            self._plain_inner(layer, activation)
        self._add_projected()

    def kv_heads(self, layer: int) -> int:
        count = self.hyperparameters.head_counts_kv[layer]
        if count == 0:
            raise self.keys.error("attention.head_count_kv", f"the count is 0 in layer {layer}, which has attention")
        return count

    def add_given(self, level: int) -> None:
        self._steps.append(steps.GivenRows(self._hidden, self._hidden, level, adds=True))

    def append(self, added: Iterable[steps.Step]) -> None:
        self._steps += added

    def mix(self, layer: int, mixer: Iterable[steps.Step], *, beside: bool = False) -> None:
        """Appends a norm of the hidden state and the steps of `mixer`, which must write the buffer `projected`. Then
        adds `projected` to the hidden state. If `beside`, appends no norm, because `mixer` reads attention's norm."""
        if not beside:
            self._norm(f"blk.{layer}.attn_norm", self._hidden)
        self.append(mixer)
        self._add_projected()

    def _attend(self, layer: int, variant: AttentionVariant) -> None:
        hp, prefix = self.hyperparameters, f"blk.{layer}"
        kv_heads = self.kv_heads(layer)
        query, out = Buffer("query", hp.query_width), Buffer("attended", hp.query_width)
        key, value = (Buffer(name, kv_heads * hp.key_length) for name in ("key", "value"))
        self._project(prefix, query, key, value)
        self._place(prefix, variant, query, key)
        self._steps.append(
            steps.Attention(
                query,
                key,
                value,
                out,
                layer=layer,
                heads=hp.head_count,
                kv_heads=kv_heads,
                head_dim=hp.key_length,
                scale=1 / math.sqrt(hp.key_length) if variant.scale is None else variant.scale,
                kv_type=self.kv_type,
                window=variant.window,
                soft_cap=variant.soft_cap,
                slopes=variant.slopes,
                causal=variant.causal,
                chunked=variant.chunked,
                sinks=self.vector(f"{prefix}.attn_sinks.weight", hp.head_count) if variant.sinks else None,
            )
        )
        self._matmul(f"{prefix}.attn_output", out, self._projected)

    def _place(self, prefix: str, variant: AttentionVariant, query: Buffer, key: Buffer) -> None:
        hp, norms = self.hyperparameters, variant.head_norms
        parts = (("q", query, hp.head_count), ("k", key, key.width // hp.key_length))
        if norms in (HeadNorms.PER_HEAD, HeadNorms.WHOLE):
            self._norm_heads(prefix, parts, whole=norms is HeadNorms.WHOLE)
        if variant.temperature is not None:
            self._steps.append(steps.PositionScale(query, query, *variant.temperature))
        if variant.table is not None:
            for _, x, heads in parts:
                rope = steps.Rope(x, heads, hp.key_length, variant.style, variant.table, variant.sections)
                self._steps.append(rope)
        if norms is HeadNorms.PER_HEAD_AFTER_ROPE:
            self._norm_heads(prefix, parts)
        if norms is HeadNorms.UNIT_AFTER_ROPE:
            self._steps += [steps.RmsNorm(x, x, None, self.rms_epsilon, heads) for _, x, heads in parts]

    def _norm_heads(self, prefix: str, parts: Iterable[tuple[str, Buffer, int]], *, whole: bool = False) -> None:
        for name, x, heads in parts:
            self._rms_norm(f"{prefix}.attn_{name}_norm", x, x, 1 if whole else heads)

    def feed_forward(
        self,
        layer: int,
        *,
        fused: bool = False,
        activation: ActivationFunction = ActivationFunction.SILU,
        norms: Norms = Norms.BEFORE,
        norm: str = "ffn_norm",
    ) -> None:
        """Appends hidden += down(activation(gate) * up). Gate and up read the normed hidden state. `norm` is the norm's
        name. If `fused`, the tensor `ffn_up` has the rows of gate, followed by the rows of up."""
        prefix = f"blk.{layer}"
        self._norm_before(f"{prefix}.{norm}", norms)
        self._gated_inner(layer, activation, fused=fused)
        self._add_projected(None if norms is Norms.BEFORE else f"{prefix}.post_ffw_norm")

    def _gated_inner(self, layer: int, activation: ActivationFunction, *, fused: bool = False) -> None:
        prefix, width = f"blk.{layer}", self.hyperparameters.feed_forward_lengths[layer]
        gate, up = Buffer("gate", width), Buffer("up", width)
        if fused:
            self._matmul_parts(f"{prefix}.ffn_up", gate, up)
        else:
            self._matmul(f"{prefix}.ffn_gate", self._normed, gate)
            self._matmul(f"{prefix}.ffn_up", self._normed, up)
        if activation is ActivationFunction.SILU:
            self._steps.append(steps.SiluMul(gate, up, gate))
        else:
            self._steps += [steps.Activate(gate, gate, activation), steps.Mul(gate, up, gate)]
        self._matmul(f"{prefix}.ffn_down", gate, self._projected)

    def plain_feed_forward(self, layer: int, activation: ActivationFunction, *, norm: str = "ffn_norm") -> None:
        """Appends the steps of hidden += down(activation(up)), where up is a projection of the normed hidden state."""
        self._norm(f"blk.{layer}.{norm}", self._hidden)
        self._plain_inner(layer, activation)
        self._add_projected()

    def _plain_inner(self, layer: int, activation: ActivationFunction) -> None:
        prefix, up = f"blk.{layer}", Buffer("up", self.hyperparameters.feed_forward_lengths[layer])
        activated = Buffer("gate", up.width)
        self._matmul(f"{prefix}.ffn_up", self._normed, up)
        self._steps.append(steps.Activate(up, activated, activation))
        self._matmul(f"{prefix}.ffn_down", activated, self._projected)

    def experts(self, layer: int, variant: ExpertsVariant, *, norm: str = "ffn_norm") -> None:
        """Appends hidden += weighted sum of the chosen experts + shared expert. All read the normed hidden state."""
        self._norm(f"blk.{layer}.{norm}", self._hidden)
        self._mix_experts(f"blk.{layer}", variant)
        self._add_projected()

    def _mix_experts(self, prefix: str, variant: ExpertsVariant) -> None:
        buffers = self._normed, self._projected
        self._steps.append(expert_step(self, prefix, self.hyperparameters, variant, buffers))
        if variant.shared_width:
            self._shared_expert(prefix, variant)

    def _shared_expert(self, prefix: str, variant: ExpertsVariant) -> None:
        gate, up = (Buffer(name, variant.shared_width) for name in ("shared gate", "shared up"))
        out = Buffer("shared", self._projected.width)
        self._matmul(f"{prefix}.ffn_gate_shexp", self._normed, gate)
        self._matmul(f"{prefix}.ffn_up_shexp", self._normed, up)
        self._steps.append(steps.SiluMul(gate, up, gate))
        self._matmul(f"{prefix}.ffn_down_shexp", gate, out)
        if variant.shared_gate:
            weight = self.vector(f"{prefix}.ffn_gate_inp_shexp.weight", self._normed.width)
            self._steps.append(steps.SigmoidGate(self._normed, out, out, weight))
        self._steps.append(steps.Add(self._projected, out, self._projected))

    def rope_table(self, rope: RopeParameters | None = None) -> RopeTable:
        trained = self.hyperparameters.rope
        return rope_table(rope or trained, self.rope_factors(trained, self._context_tokens))

    def window_rope_table(self) -> RopeTable:
        base = self.keys.real("rope.freq_base_swa", 10000.0, minimum=1.0, maximum=1e12)
        rope = self.hyperparameters.rope
        return self.rope_table(replace(rope, frequency_base=base, scaling=RopeScaling.NONE, factor=1.0))

    def _norm(self, name: str, x: Buffer, out: Buffer | None = None) -> None:
        out = out or self._normed
        if self._layer_norm_epsilon is None:
            self._rms_norm(name, x, out)
            return
        weight = self.vector(f"{name}.weight", x.width)
        bias = self.vector(f"{name}.bias", x.width) if self._norm_biases else None
        self._steps.append(steps.LayerNorm(x, out, weight, bias, self._layer_norm_epsilon))

    def _rms_norm(self, name: str, x: Buffer, out: Buffer, heads: int = 1) -> None:
        """Appends an RMS norm. In files of Falcon H1, the name of the norm's tensor lacks `.weight`."""
        weight = self.vector(name if self.has(name) else f"{name}.weight", x.width // heads)
        self._steps.append(steps.RmsNorm(x, out, weight, self.rms_epsilon, heads))

    @property
    def rms_epsilon(self) -> float:
        epsilon = self.hyperparameters.rms_epsilon
        if epsilon is None:
            epsilon = self.keys.real("attention.layer_norm_rms_epsilon", minimum=1e-13, maximum=0.1)
        return epsilon

    def _add_projected(self, norm: str | None = None) -> None:
        if norm is not None:
            self._rms_norm(norm, self._projected, self._projected)
        if self._residual_scale != 1.0:
            self._steps.append(steps.Scale(self._projected, self._projected, self._residual_scale))
        self._steps.append(steps.Add(self._hidden, self._projected, self._hidden))

    def _project(self, prefix: str, query: Buffer, key: Buffer, value: Buffer) -> None:
        if f"{prefix}.attn_qkv.weight" in self.model.tensors:
            self._matmul_parts(f"{prefix}.attn_qkv", query, key, value)
            return
        for name, out in (("attn_q", query), ("attn_k", key), ("attn_v", value)):
            self._matmul(f"{prefix}.{name}", self._normed, out)

    def _matmul_parts(self, name: str, *parts: Buffer) -> None:
        self._steps += self.product_parts(name, self._normed, parts)

    def _matmul(self, name: str, x: Buffer, out: Buffer) -> None:
        self._steps.append(self.product(name, x, out))
