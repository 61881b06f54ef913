"""The block of Mamba 2. Hybrid models have this block instead of attention, or parallel to attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llamaclust.model import program as ir
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.model_keys import ModelKeys
from llamaclust.model.program import KV_BLOCK_TOKENS, Buffer
from llamaclust.model.steps.options import ActivationFunction
from llamaclust.model.steps.states import MAX_STATE_FLOATS, MAX_TAPS

_MAX_HEADS, _MAX_WIDTH, _MAX_STATE_SIZE = 1 << 14, 1 << 20, 1 << 12


@dataclass(frozen=True, slots=True)
class MambaShape:
    """The shape of a Mamba 2 block. `inner` is the number of channels of all `heads` together. Heads of the same group
    share the vectors B and C, which have `state_size` numbers for each token."""

    taps: int
    inner: int
    state_size: int
    heads: int
    groups: int

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.groups * self.state_size

    @property
    def fault(self) -> tuple[str, str] | None:
        if self.inner % self.heads:
            return "ssm.inner_size", f"{self.heads} heads do not divide {self.inner}"
        if self.heads % self.groups:
            return "ssm.group_count", f"{self.groups} groups do not divide {self.heads} heads"
        if self.inner * self.state_size > MAX_STATE_FLOATS:
            what = f"{self.inner} channels with {self.state_size} numbers each"
            return "ssm.state_size", f"{what} exceed the limit of {MAX_STATE_FLOATS} numbers"
        if (self.taps - 1) * self.convolved > MAX_STATE_FLOATS:
            what = (
                f"{self.groups} groups of {self.state_size} numbers need {self.convolved} channels of the convolution"
            )
            most = MAX_STATE_FLOATS // (self.taps - 1)
            return "ssm.group_count", f"{what}; with {self.taps} taps, the limit is {most}"
        if self.inner % KV_BLOCK_TOKENS or self.convolved % KV_BLOCK_TOKENS:
            what = f"{self.inner} and {self.convolved} channels of the convolution"
            return "ssm.inner_size", f"expected multiples of {KV_BLOCK_TOKENS}, found {what}"
        return None


def read_mamba_shape(keys: ModelKeys) -> MambaShape:
    inner = keys.count("ssm.inner_size", maximum=_MAX_WIDTH)
    heads = keys.count("ssm.time_step_rank", maximum=_MAX_HEADS)
    groups = keys.count("ssm.group_count", maximum=_MAX_HEADS)
    state_size = keys.count("ssm.state_size", maximum=_MAX_STATE_SIZE)
    shape = MambaShape(keys.count("ssm.conv_kernel", minimum=2, maximum=MAX_TAPS), inner, state_size, heads, groups)
    if shape.fault is not None:
        raise keys.error(*shape.fault)
    return shape


def mamba(builder: ProgramBuilder, layer: int, shape: MambaShape, *, has_norm: bool = True) -> Iterator[ir.Step]:
    """Yields the steps of Mamba 2, which read the buffer `normed` and write the buffer `projected`. If `has_norm`, the
    file must have a norm for each group."""
    prefix, hidden_width = f"blk.{layer}", builder.hyperparameters.embedding_length
    normed, projected = (Buffer(name, hidden_width) for name in ("normed", "projected"))
    gate, convolving = Buffer("mamba gate", shape.inner), Buffer("mamba x+b+c", shape.convolved)
    convolved, dt = Buffer("mamba convolved", shape.convolved), Buffer("mamba dt", shape.heads)
    yield from builder.product_parts(f"{prefix}.ssm_in", normed, (gate, convolving, dt))
    weight = builder.weight(f"{prefix}.ssm_conv1d.weight", (shape.convolved, shape.taps))
    bias = builder.optional_vector(f"{prefix}.ssm_conv1d.bias", shape.convolved)
    yield ir.Convolution(convolving, convolved, weight, shape.taps, layer, bias)
    yield ir.Activate(convolved, convolved, ActivationFunction.SILU)
    out = Buffer("mamba out", shape.inner)
    yield _scan(builder, prefix, shape, (convolved, dt, out), layer)
    yield ir.SiluMul(gate, out, out)
    if has_norm or builder.has(f"{prefix}.ssm_norm.weight"):
        yield _group_norm(builder, f"{prefix}.ssm_norm.weight", shape, out)
    yield builder.product(f"{prefix}.ssm_out", out, projected)


def _scan(
    builder: ProgramBuilder, prefix: str, shape: MambaShape, buffers: tuple[Buffer, Buffer, Buffer], layer: int
) -> ir.Scan:
    bias = builder.vector(f"{prefix}.ssm_dt.bias", shape.heads)
    decay, skip = (builder.floats(f"{prefix}.ssm_{name}", (shape.heads, 1)) for name in ("a", "d"))
    return ir.Scan(*buffers, bias, decay, skip, shape.groups, layer)


def _group_norm(builder: ProgramBuilder, name: str, shape: MambaShape, x: Buffer) -> ir.RmsNorm:
    weight = builder.floats(name, (shape.groups, shape.inner // shape.groups))
    return ir.RmsNorm(x, x, weight, builder.rms_epsilon, shape.groups, own_weights=True)
