"""Gemma 3n. A row has several copies of the hidden state. Each layer computes one copy and corrects the others (AltUp).
A low-rank branch (Laurel) is parallel to attention. Each layer has an embedding of the token as an extra input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llamaclust.model import program as ir
from llamaclust.model.architectures.gemma.attention import LayerKind, attention, shared_kv_sources
from llamaclust.model.architectures.gemma.layer_inputs import LayerInputs
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.model_keys import SHARED_KV_KEY, ModelKeys
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction

_PERIOD = 5
_MAX_CAP = 1e6
_MAX_COPIES = 16
_MAX_RANK = 1 << 14
_MAX_SPARSITY = 16.0  # In standard deviations.
_LEAST_SQUARE = 1e-5


def gemma3n(builder: ProgramBuilder) -> None:
    """Builds Gemma 3n, text only. A stage sends the hidden state's copies, and the per-layer inputs of later layers."""
    hp, keys = builder.hyperparameters, builder.keys
    for key in ("attention.sliding_window", "embedding_length_per_layer_input", SHARED_KV_KEY):
        keys.count(key, minimum=0 if key == SHARED_KV_KEY else 1, maximum=1 << 30)  # All known files have this key.
    final_cap = keys.real("final_logit_softcapping", 30.0, minimum=1e-3, maximum=_MAX_CAP)
    copies = _Copies.of(builder)
    inputs = LayerInputs.of(builder, copies.all)
    assert inputs is not None
    windowed, sparsity = keys.windowed_layers(hp.block_count, _PERIOD), _sparsity(keys, hp.block_count)
    full = LayerKind(hp.key_length, builder.rope_table())
    part = LayerKind(hp.key_length, builder.window_rope_table(), hp.sliding_window)
    sources = shared_kv_sources(keys, windowed)
    builder.given = inputs.given
    for layer in builder.layers(math.sqrt(hp.embedding_length), soft_cap=final_cap):
        if layer == inputs.first:
            builder.append(inputs.begin())
        if layer == 0:
            builder.append(copies.begin())
        kind = part if windowed[layer] else full
        builder.append(_Layer(builder, layer, kind, sources[layer], sparsity[layer], copies, inputs).steps())
        if layer + 1 == hp.block_count:
            builder.append(copies.merge())
        elif layer + 1 == inputs.end:
            builder.append(inputs.join())
            builder.out = inputs.sent


def _sparsity(keys: ModelKeys, layers: int) -> tuple[float | None, ...]:
    """Returns each layer's gate threshold in standard deviations above the mean. Gates below it become 0."""
    key = "activation_sparsity_scale"
    numbers = keys.reals(key, layers)
    for number in numbers:
        if number != -math.inf and not abs(number) <= _MAX_SPARSITY:
            raise keys.error(key, f"expected -inf, or -{_MAX_SPARSITY:g} to {_MAX_SPARSITY:g}, found {number:g}")
    return tuple(None if number == -math.inf else number for number in numbers)


@dataclass(frozen=True, slots=True)
class _Copies:
    """The copies of the hidden state (AltUp), side by side in each row. A layer computes only copy `active`."""

    builder: ProgramBuilder
    count: int
    active: int

    @classmethod
    def of(cls, builder: ProgramBuilder) -> _Copies:
        count = builder.keys.count("altup.num_inputs", minimum=2, maximum=_MAX_COPIES)
        return cls(builder, count, builder.keys.count("altup.active_idx", 0, minimum=0, maximum=count - 1))

    @property
    def width(self) -> int:
        return self.builder.hyperparameters.embedding_length

    @property
    def all(self) -> Buffer:
        return Buffer("copies", self.count * self.width)

    @property
    def _hidden(self) -> Buffer:
        return Buffer("hidden", self.width)

    def begin(self) -> Iterator[ir.Step]:
        """Yields the steps that make the copies: the embedding, and projections that have the embedding's magnitude."""
        repeated = self._hidden
        for count in range(2, self.count):
            more = Buffer(f"embedding {count} times", count * self.width)
            yield ir.Join(repeated, self._hidden, more)
            repeated = more
        projected = Buffer("projected copies", repeated.width)
        yield self._project("altup_proj", repeated, projected)
        yield ir.MatchMagnitude(projected, self._hidden, projected, _LEAST_SQUARE)
        yield ir.Join(self._hidden, projected, self.all)

    def merge(self) -> Iterator[ir.Step]:
        """Yields the steps that project the other copies, scale the results to copy 0's magnitude, and compute the mean
        of copy 0 and the results."""
        others, projected = (Buffer(name, self.all.width - self.width) for name in ("other copies", "projected copies"))
        yield ir.Slice(self.all, self._hidden, 0)
        yield ir.Slice(self.all, others, self.width)
        yield self._project("altup_unembd_proj", others, projected)
        yield ir.MatchMagnitude(projected, self._hidden, projected, _LEAST_SQUARE)
        yield ir.Mix(projected, self._hidden, self._hidden, self.width)
        yield ir.Scale(self._hidden, self._hidden, 1 / self.count)

    def _project(self, name: str, x: Buffer, out: Buffer) -> ir.HeadMatMul:
        weight = self.builder.weight(f"{name}.weight", (self.count - 1, self.width, self.width))
        return ir.HeadMatMul(x, out, weight, self.count - 1)


@dataclass(frozen=True, slots=True)
class _Layer:
    builder: ProgramBuilder
    layer: int
    kind: LayerKind
    source: int  # Number of the layer whose keys and values this layer reads.
    sparsity: float | None
    copies: _Copies
    inputs: LayerInputs

    def _buffer(self, name: str) -> Buffer:
        return Buffer(name, self.copies.width)

    def steps(self) -> Iterator[ir.Step]:
        predicted = Buffer("predicted", self.copies.all.width)
        active, result = self._buffer("active"), self._buffer("result")
        yield from self._predict(predicted, active)
        yield from self._attention(active, result)
        yield from self._feed_forward(result)
        yield from self._correct(predicted, active, result)
        yield from self._add_input(active)

    def _predict(self, predicted: Buffer, active: Buffer) -> Iterator[ir.Step]:
        """Yields the steps of AltUp's prediction: predicted_i = copy_i + a weighted sum of all copies."""
        copies, coefficients = self.copies.all, Buffer("predictions", self.copies.count**2)
        yield ir.Slice(copies, active, self.copies.active * active.width)
        yield from self._coefficients(active, "altup_predict_coef", coefficients)
        yield ir.Mix(copies, copies, predicted, active.width, coefficients)
        yield ir.Slice(predicted, active, self.copies.active * active.width)

    def _correct(self, predicted: Buffer, active: Buffer, result: Buffer) -> Iterator[ir.Step]:
        """Yields the steps of AltUp's correction: copy_i = predicted_i + (1 + coefficient_i) * (result - active)."""
        coefficients = Buffer("corrections", self.copies.count)
        yield from self._coefficients(result, "altup_correct_coef", coefficients)
        yield ir.Scale(active, active, -1.0)
        yield ir.Add(result, active, active)
        yield ir.Mix(active, predicted, self.copies.all, active.width, coefficients, 1.0)

    def _coefficients(self, x: Buffer, name: str, out: Buffer) -> Iterator[ir.Step]:
        """Yields the steps of out = weight @ tanh(router(norm(x) / width)). `name` is the weight's name."""
        routed, modalities = self._buffer("routed"), Buffer("modalities", self.copies.count)
        yield self._norm("altup_router_norm", x, routed)
        yield ir.Scale(routed, routed, 1 / routed.width)
        yield self._product("altup_router", routed, modalities)
        yield ir.SoftCap(modalities, modalities, 1.0)
        yield self._product(name, modalities, out)

    def _attention(self, active: Buffer, result: Buffer) -> Iterator[ir.Step]:
        """Yields result = (active + norm(attention(n)) + n + norm(laurel(n))) / sqrt(2), where n = norm(active)."""
        normed, projected = self._buffer("normed"), self._buffer("projected")
        rank = self.builder.model.tensor(f"blk.{self.layer}.laurel_l.weight").shape[0]
        if rank > _MAX_RANK:
            raise self.builder.error(f"blk.{self.layer}.laurel_l.weight", f"{rank} rows; the limit is {_MAX_RANK}")
        low = Buffer("laurel rank", rank)
        yield self._norm("attn_norm", active, normed)
        yield self._product("laurel_l", normed, low)
        yield self._product("laurel_r", low, result)
        yield self._norm("laurel_post_norm", result, result)
        yield ir.Add(result, normed, result)
        if self.source == self.layer:
            self.builder.require(self.layer, "attn_v.weight")
        yield from attention(self.builder, self.layer, self.source, self.kind, (normed, projected))
        yield self._norm("post_attention_norm", projected, projected)
        yield ir.Add(projected, active, projected)
        yield ir.Add(projected, result, result)
        yield ir.Scale(result, result, 1 / math.sqrt(2))

    def _feed_forward(self, result: Buffer) -> Iterator[ir.Step]:
        """Yields the steps of result += norm(down(gelu(gate) * up)). Both gate and up read norm(result)."""
        normed, width = self._buffer("normed"), self.builder.hyperparameters.feed_forward_lengths[self.layer]
        gate, up, projected = Buffer("gate", width), Buffer("up", width), self._buffer("projected")
        yield self._norm("ffn_norm", result, normed)
        yield self._product("ffn_gate", normed, gate)
        yield self._product("ffn_up", normed, up)
        if self.sparsity is not None:
            yield ir.GaussianTopK(gate, gate, self.sparsity)
        yield ir.Activate(gate, gate, ActivationFunction.GELU_TANH)
        yield ir.Mul(gate, up, gate)
        yield self._product("ffn_down", gate, projected)
        yield self._norm("post_ffw_norm", projected, projected)
        yield ir.Add(result, projected, result)

    def _add_input(self, active: Buffer) -> Iterator[ir.Step]:
        """Yields the steps that add the per-layer input, gated by the active copy, to all copies except the first."""
        projected, copies = self._buffer("projected"), self.copies.all
        scale = self.builder.vector(f"blk.{self.layer}.altup_correct_scale.weight", active.width)
        yield ir.Slice(copies, active, self.copies.active * active.width)
        yield ir.ScaleByWeight(active, active, scale, by_channel=True)
        yield from self.inputs.project(self.layer, active, projected)
        yield ir.Mix(projected, copies, copies, active.width, first=1)

    def _product(self, name: str, x: Buffer, out: Buffer) -> ir.MatMul:
        return self.builder.product(f"blk.{self.layer}.{name}", x, out)

    def _norm(self, name: str, x: Buffer, out: Buffer) -> ir.RmsNorm:
        weight = self.builder.vector(f"blk.{self.layer}.{name}.weight", x.width)
        return ir.RmsNorm(x, out, weight, self.builder.rms_epsilon)
