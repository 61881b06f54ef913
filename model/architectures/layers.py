"""The pieces that architectures are put together from; every weight is checked against the file as it is named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model import program as steps
from llamaclust.model.architectures.positions import rope_table
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.hyperparameters import Hyperparameters, ModelKeys, RopeParameters, RopeScaling
from llamaclust.model.pooling import Pooling, read_pooling
from llamaclust.model.program import ActivationFunction, Buffer, KvType, Program, RopeStyle, RopeTable
from llamaclust.model.quant_types import QuantType

EMBEDDING, _POSITIONS = "token_embd.weight", "position_embd.weight"
_FACTORS, _SHORT_FACTORS, _LONG_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
FACTOR_TENSORS = (_FACTORS, _SHORT_FACTORS, _LONG_FACTORS)
"""Tensors that become part of the program and are none of its weights."""


@dataclass(frozen=True, slots=True)
class AttentionVariant:
    """Options of an attention block. Without `table` nothing is rotated; `scale`: 1 / sqrt(head_dim) by default;
    `head_norms`: q and k are normed per head before rotation. `window`, `soft_cap`, `slopes`: as of `Attention`."""

    style: RopeStyle = RopeStyle.NEOX
    table: RopeTable | None = None
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    slopes: tuple[float, ...] | None = None
    head_norms: bool = False
    causal: bool = True


class ProgramBuilder:
    """Collects the steps of layers [start, end). Methods append in the order of computation."""

    def __init__(
        self,
        model: ModelFile,
        hyperparameters: Hyperparameters,
        start: int,
        end: int,
        kv_type: KvType,
        context_tokens: int | None,
    ) -> None:
        assert 0 <= start < end <= hyperparameters.block_count, (start, end, hyperparameters.block_count)
        self.model = model
        self.hyperparameters = hyperparameters
        self._layers = range(start, end)
        self.keys = ModelKeys(model, hyperparameters.architecture)
        self._kv_type = kv_type
        self._context_tokens = context_tokens or hyperparameters.context_length
        self._steps: list[steps.Step] = []
        width = hyperparameters.embedding_length
        self._hidden = Buffer("hidden", width)
        self._normed = Buffer("normed", width)
        self._projected = Buffer("projected", width)
        self._last_normed = Buffer("last normed", width)
        self._out = self._hidden
        self._layer_norm_epsilon: float | None = None
        self._norm_biases = True

    def program(self) -> Program:
        layers = self.hyperparameters.block_count
        start, end = self._layers.start, self._layers.stop
        normed = self._last_normed if end == layers else None
        return Program(start, end, layers, self._hidden, self._out, tuple(self._steps), normed)

    def use_layer_norms(self, *, biases: bool = True) -> None:
        """From here on norms subtract the mean, and add a bias unless there are no `biases`."""
        self._norm_biases = biases
        self._layer_norm_epsilon = self.keys.real("attention.layer_norm_epsilon", minimum=1e-13, maximum=0.1)

    def layers(
        self,
        embedding_factor: float = 1.0,
        *,
        positions: bool = False,
        soft_cap: float | None = None,
        may_rank: bool = False,
    ) -> Iterator[int]:
        """The layers to append, after the embedding of a first stage and before the head of a last one.

        The embedding is multiplied by `embedding_factor`; `positions` are learned, too; `soft_cap`: of the logits;
        `may_rank`: the file's pooling may be rank, and the head is a classifier then."""
        self._embed(embedding_factor, positions)
        yield from self._layers
        if self._layers.stop == self.hyperparameters.block_count:
            self._norm("output_norm", self._hidden, self._last_normed)
            if may_rank and read_pooling(self.model) is Pooling.RANK:
                self._ranking_head()
            else:
                self._head(soft_cap)

    def _embed(self, factor: float, positions: bool) -> None:
        if self._layers.start > 0:
            return
        hp = self.hyperparameters
        embedded = Buffer("embedded", self._hidden.width) if positions else self._hidden
        shape = (hp.vocabulary_size, hp.embedding_length)
        self._steps.append(steps.Embed(embedded, self.weight(EMBEDDING, shape)))
        if factor != 1.0:
            self._steps.append(steps.Scale(embedded, embedded, factor))
        if positions:
            self._add_positions(embedded, self._hidden)

    def _add_positions(self, embedded: Buffer, out: Buffer) -> None:
        hp = self.hyperparameters
        weight = self.weight(_POSITIONS, (hp.context_length, hp.embedding_length))
        if self._context_tokens > hp.context_length:
            what = f"{hp.context_length} positions, fewer than a context of {self._context_tokens} tokens"
            raise self.error(_POSITIONS, what, f"set context_length to {hp.context_length} or less")
        self._steps.append(steps.AddPosition(embedded, out, weight))

    def _head(self, soft_cap: float | None) -> None:
        """Of the normed rows, which embeddings have, those that are wanted, and their logits. Without `output.weight`
        the token embedding is used again."""
        self._out = Buffer(steps.LOGITS, self.hyperparameters.vocabulary_size)
        selected = Buffer("selected", self._hidden.width)
        self._steps.append(steps.SelectRows(self._last_normed, selected))
        weight = "output" if "output.weight" in self.model.tensors else EMBEDDING.removesuffix(".weight")
        self._matmul(weight, selected, self._out)
        if soft_cap is not None:
            self._steps.append(steps.SoftCap(self._out, self._out, soft_cap))

    def _ranking_head(self) -> None:
        """Of every row the scores of the classes, as rows of a head: [rows, classes]."""
        name = "cls.output.weight"
        scores = Buffer("scores", self.model.tensor(name).shape[0])
        if scores.width < 2:
            raise self.error(name, "1 class, of which the share is always 1; at least 2 expected")
        self._matmul("cls.output", self._last_normed, scores)
        self._out = Buffer("selected", self._hidden.width)
        self._steps.append(steps.SelectRows(self._hidden, self._out))
        self._last_normed = scores

    def attention(self, layer: int, variant: AttentionVariant = AttentionVariant(), *, post_norm: bool = False) -> None:
        """hidden += output(attention(rope(q), rope(k), v)) of the normed hidden state. `post_norm` norms the output
        before it is added."""
        prefix = f"blk.{layer}"
        self._norm(f"{prefix}.attn_norm", self._hidden)
        self._attend(layer, variant)
        self._add_projected(f"{prefix}.post_attention_norm" if post_norm else None)

    def parallel(self, layer: int, variant: AttentionVariant, activation: ActivationFunction) -> None:
        """hidden += attention + down(activation(up)), both of the hidden state before; one or two norms."""
        prefix, second = f"blk.{layer}", f"blk.{layer}.attn_norm_2"
        two = any(f"{second}.{part}" in self.model.tensors for part in ("weight", "bias"))
        self._norm(second if two else f"{prefix}.attn_norm", self._hidden)
        self._attend(layer, variant)
        if two:
            self._norm(f"{prefix}.attn_norm", self._hidden)
        self._add_projected()
        self._plain_inner(prefix, activation)
        self._add_projected()

    def _attend(self, layer: int, variant: AttentionVariant) -> None:
        """projected = output(attention(rope(q), rope(k), v)) of the normed hidden state."""
        hp, prefix = self.hyperparameters, f"blk.{layer}"
        query, out = Buffer("query", hp.query_width), Buffer("attended", hp.query_width)
        key, value = Buffer("key", hp.kv_width), Buffer("value", hp.kv_width)
        self._project(prefix, query, key, value)
        if variant.head_norms:
            self._rms_norm(f"{prefix}.attn_q_norm", query, query, hp.head_count)
            self._rms_norm(f"{prefix}.attn_k_norm", key, key, hp.head_count_kv)
        if variant.table is not None:
            self._steps.append(steps.Rope(query, hp.head_count, hp.key_length, variant.style, variant.table))
            self._steps.append(steps.Rope(key, hp.head_count_kv, hp.key_length, variant.style, variant.table))
        self._steps.append(
            steps.Attention(
                query,
                key,
                value,
                out,
                layer=layer,
                heads=hp.head_count,
                kv_heads=hp.head_count_kv,
                head_dim=hp.key_length,
                scale=1 / math.sqrt(hp.key_length) if variant.scale is None else variant.scale,
                kv_type=self._kv_type,
                window=variant.window,
                soft_cap=variant.soft_cap,
                slopes=variant.slopes,
                causal=variant.causal,
            )
        )
        self._matmul(f"{prefix}.attn_output", out, self._projected)

    def feed_forward(
        self,
        layer: int,
        *,
        fused: bool = False,
        activation: ActivationFunction = ActivationFunction.SILU,
        post_norm: bool = False,
    ) -> None:
        """hidden += down(activation(gate) * up) of the normed hidden state; `post_norm` as of `attention`.

        `fused`: the rows of gate and up are one tensor, `ffn_up`, the gate's first.
        """
        prefix = f"blk.{layer}"
        self._norm(f"{prefix}.ffn_norm", self._hidden)
        self._gated_inner(prefix, activation, fused=fused)
        self._add_projected(f"{prefix}.post_ffw_norm" if post_norm else None)

    def _gated_inner(self, prefix: str, activation: ActivationFunction, *, fused: bool = False) -> None:
        """projected = down(activation(gate) * up) of the normed hidden state."""
        width = self.hyperparameters.feed_forward_length
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

    def plain_feed_forward(self, layer: int, activation: ActivationFunction) -> None:
        """hidden += down(activation(up)) of the normed hidden state: an inner layer without a gate."""
        self._norm(f"blk.{layer}.ffn_norm", self._hidden)
        self._plain_inner(f"blk.{layer}", activation)
        self._add_projected()

    def _plain_inner(self, prefix: str, activation: ActivationFunction) -> None:
        up = Buffer("up", self.hyperparameters.feed_forward_length)
        activated = Buffer("gate", up.width)
        self._matmul(f"{prefix}.ffn_up", self._normed, up)
        self._steps.append(steps.Activate(up, activated, activation))
        self._matmul(f"{prefix}.ffn_down", activated, self._projected)

    def experts(self, layer: int, *, normalized: bool = True, shared_width: int = 0) -> None:
        """hidden += the weighted best experts, of the normed hidden state. Their weights are `normalized` to a sum of
        one; an expert of `shared_width` that every token uses is weighed by a gate of its own."""
        prefix = f"blk.{layer}"
        self._norm(f"{prefix}.ffn_norm", self._hidden)
        self._choose_experts(prefix, normalized=normalized)
        if shared_width:
            self._shared_expert(prefix, shared_width)
        self._add_projected()

    def _choose_experts(
        self, prefix: str, *, normalized: bool, activation_without_gate: ActivationFunction | None = None
    ) -> None:
        """projected = the weighted best experts of the normed hidden state."""
        old = f"{prefix}.ffn_gate.0.weight"
        if old in self.model.tensors:
            raise self.error(old, "one tensor for each expert, the form of early 2024", "convert the model again")
        if (factor := self.keys.real("expert_weights_scale", 0.0, minimum=-1e6, maximum=1e6)) not in (0.0, 1.0):
            raise self.keys.error("expert_weights_scale", f"{factor:g}, which is not supported")
        hp, without = self.hyperparameters, activation_without_gate
        width, ffn, count = hp.embedding_length, hp.expert_feed_forward_length, hp.expert_count
        gate = None if without else self.weight(f"{prefix}.ffn_gate_exps.weight", (count, ffn, width))
        self._steps.append(
            steps.Moe(
                self._normed,
                self._projected,
                router=self.weight(f"{prefix}.ffn_gate_inp.weight", (count, width)),
                gate=gate,
                up=self.weight(f"{prefix}.ffn_up_exps.weight", (count, ffn, width)),
                down=self.weight(f"{prefix}.ffn_down_exps.weight", (count, width, ffn)),
                experts=count,
                used=hp.expert_used_count,
                ffn_width=ffn,
                normalized=normalized,
                activation=without or ActivationFunction.SILU,
            )
        )

    def _shared_expert(self, prefix: str, width: int) -> None:
        """projected += sigmoid(one number of the normed hidden state) * its feed-forward network."""
        gate, up = Buffer("gate", width), Buffer("up", width)
        out = Buffer("shared", self._projected.width)
        self._matmul(f"{prefix}.ffn_gate_shexp", self._normed, gate)
        self._matmul(f"{prefix}.ffn_up_shexp", self._normed, up)
        self._steps.append(steps.SiluMul(gate, up, gate))
        self._matmul(f"{prefix}.ffn_down_shexp", gate, out)
        weight = self._vector(f"{prefix}.ffn_gate_inp_shexp.weight", self._normed.width)
        self._steps.append(steps.SigmoidGate(self._normed, out, out, weight))
        self._steps.append(steps.Add(self._projected, out, self._projected))

    def rope_table(self, rope: RopeParameters | None = None) -> RopeTable:
        """The rotation of every layer, or of those that have one of their own."""
        return rope_table(rope or self.hyperparameters.rope, self._rope_factors())

    def window_rope_table(self) -> RopeTable:
        """The rotation of layers with a window, where these have a base of their own and no scaling."""
        base = self.keys.real("rope.freq_base_swa", 10000.0, minimum=1.0, maximum=1e12)
        rope = self.hyperparameters.rope
        return self.rope_table(replace(rope, frequency_base=base, scaling=RopeScaling.NONE, factor=1.0))

    def _rope_factors(self) -> tuple[float, ...] | None:
        """What a tensor of the file divides the frequencies by: `rope_freqs` (since llama 3.1), or one of two by the
        context that the program is for: as llama.cpp has it, the long ones for all sequences or for none."""
        original = self.hyperparameters.rope.original_context_length
        by_context = _LONG_FACTORS if self._context_tokens > original else _SHORT_FACTORS
        name = _FACTORS if _FACTORS in self.model.tensors else by_context
        if name not in self.model.tensors:
            return None
        self._vector(name, self.hyperparameters.rope.dimension_count // 2)
        values = np.frombuffer(self.model.tensor(name).read(), "<f4")
        if not (np.isfinite(values) & (values > 0)).all():
            raise self.error(name, "holds factors that are not positive numbers")
        return tuple(values.tolist())

    def require(self, layer: int, *names: str) -> None:
        """ModelFileError where one of the layer's tensors is missing."""
        for name in names:
            self.model.tensor(f"blk.{layer}.{name}")

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        """`name`, once the file is known to have such a tensor."""
        found = self.model.tensor(name).shape
        if found != shape:
            raise self.error(name, f"shape {list(reversed(found))}, {list(reversed(shape))} expected")
        return name

    def error(self, tensor: str, what: str, advice: str = "the file is not usable, take another one") -> ModelFileError:
        return ModelFileError(f"{self.model.path}: tensor {tensor}: {what}; {advice}")

    def _vector(self, name: str, width: int) -> str:
        self.weight(name, (width,))
        found = self.model.tensor(name).quant_type
        if found is not QuantType.F32:
            raise self.error(name, f"type {found.name}, F32 expected")
        return name

    def _norm(self, name: str, x: Buffer, out: Buffer | None = None) -> None:
        """To `normed` unless another buffer is named."""
        out = out or self._normed
        if self._layer_norm_epsilon is None:
            self._rms_norm(name, x, out)
            return
        weight = self._vector(f"{name}.weight", x.width)
        bias = self._vector(f"{name}.bias", x.width) if self._norm_biases else None
        self._steps.append(steps.LayerNorm(x, out, weight, bias, self._layer_norm_epsilon))

    def _rms_norm(self, name: str, x: Buffer, out: Buffer, heads: int = 1) -> None:
        """ModelFileError where the file has the epsilon of the norms with a mean alone."""
        weight = self._vector(f"{name}.weight", x.width // heads)
        epsilon = self.hyperparameters.rms_epsilon
        if epsilon is None:
            epsilon = self.keys.real("attention.layer_norm_rms_epsilon", minimum=1e-13, maximum=0.1)
        self._steps.append(steps.RmsNorm(x, out, weight, epsilon, heads))

    def _add_projected(self, norm: str | None = None) -> None:
        """hidden += projected, normed before where a norm is named."""
        if norm is not None:
            self._rms_norm(norm, self._projected, self._projected)
        self._steps.append(steps.Add(self._hidden, self._projected, self._hidden))

    def _project(self, prefix: str, query: Buffer, key: Buffer, value: Buffer) -> None:
        """Queries, keys and values of the normed hidden state, from tensors of their own or from one."""
        if f"{prefix}.attn_qkv.weight" in self.model.tensors:
            self._matmul_parts(f"{prefix}.attn_qkv", query, key, value)
            return
        for name, out in (("attn_q", query), ("attn_k", key), ("attn_v", value)):
            self._matmul(f"{prefix}.{name}", self._normed, out)

    def _matmul_parts(self, name: str, *parts: Buffer) -> None:
        """One product of the normed hidden state whose channels are those of `parts`, one after the other."""
        whole = Buffer("+".join(part.name for part in parts), sum(part.width for part in parts))
        self._matmul(name, self._normed, whole)
        start = 0
        for part in parts:
            self._steps.append(steps.Slice(whole, part, start))
            start += part.width

    def _matmul(self, name: str, x: Buffer, out: Buffer) -> None:
        """A bias is added where the file has one."""
        weight = self.weight(f"{name}.weight", (out.width, x.width))
        bias = f"{name}.bias"
        has_bias = bias in self.model.tensors
        self._steps.append(steps.MatMul(x, out, weight, self._vector(bias, out.width) if has_bias else None))
