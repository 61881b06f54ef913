from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llamaclust.model import program as ir
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction

_MAX_INPUT = 1 << 12


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Per-layer inputs of `width` channels, which Gemma's layers read in addition to the hidden state. The first stage
    computes the inputs of all layers from a row's token."""

    builder: ProgramBuilder
    width: int
    first: int  # Number of the stage's first layer.
    end: int
    carried: Buffer  # Buffer with the hidden state between two layers.

    @classmethod
    def of(cls, builder: ProgramBuilder, carried: Buffer) -> LayerInputs | None:
        width = builder.keys.count("embedding_length_per_layer_input", 0, minimum=0, maximum=_MAX_INPUT)
        return cls(builder, width, builder.stage.start, builder.stage.stop, carried) if width else None

    @property
    def _layers(self) -> int:
        return self.builder.hyperparameters.block_count

    @property
    def _all(self) -> Buffer:
        return Buffer("inputs", (self._layers - self.first) * self.width)

    @property
    def _hidden(self) -> Buffer:
        return Buffer("hidden", self.builder.hyperparameters.embedding_length)

    @property
    def given(self) -> Buffer:
        return Buffer("given", self.carried.width + self._all.width) if self.first else self._hidden

    @property
    def sent(self) -> Buffer:
        return Buffer("sent", self.carried.width + (self._layers - self.end) * self.width)

    def begin(self) -> Iterator[ir.Step]:
        if self.first:
            yield ir.Slice(self.given, self.carried, 0)
            yield ir.Slice(self.given, self._all, self.carried.width)
            return
        builder, inputs, projected = self.builder, self._all, Buffer("projected inputs", self._all.width)
        shape = (builder.hyperparameters.vocabulary_size, inputs.width)
        yield ir.Embed(inputs, builder.weight("per_layer_token_embd.weight", shape))
        yield ir.Scale(inputs, inputs, math.sqrt(self.width))
        yield builder.product("per_layer_model_proj", self._hidden, projected)
        yield ir.Scale(projected, projected, 1 / math.sqrt(self._hidden.width))
        weight = builder.vector("per_layer_proj_norm.weight", self.width)
        yield ir.RmsNorm(projected, projected, weight, builder.rms_epsilon, self._layers)
        yield ir.Add(inputs, projected, inputs)
        yield ir.Scale(inputs, inputs, 1 / math.sqrt(2))

    def project(self, layer: int, hidden: Buffer, projected: Buffer) -> Iterator[ir.Step]:
        """Yields the steps of projected = norm(proj(gelu(gate(hidden)) * the layer's input))."""
        builder, prefix = self.builder, f"blk.{layer}"
        gate, own = (Buffer(name, self.width) for name in ("input gate", "layer input"))
        yield builder.product(f"{prefix}.inp_gate", hidden, gate)
        yield ir.Activate(gate, gate, ActivationFunction.GELU_TANH)
        yield ir.Slice(self._all, own, (layer - self.first) * self.width)
        yield ir.Mul(gate, own, gate)
        yield builder.product(f"{prefix}.proj", gate, projected)
        weight = builder.vector(f"{prefix}.post_norm.weight", hidden.width)
        yield ir.RmsNorm(projected, projected, weight, builder.rms_epsilon)

    def join(self) -> Iterator[ir.Step]:
        rest = Buffer("further inputs", self.sent.width - self.carried.width)
        yield ir.Slice(self._all, rest, (self.end - self.first) * self.width)
        yield ir.Join(self.carried, rest, self.sent)
