"""Every kind of step in NumPy. Sums are in float64 and do not depend on other rows. Results are in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from llamaclust.kernels.backend import Batch, Float32, Int32
from llamaclust.kernels.reference.attention import Memory, attend, soft_cap, softmax
from llamaclust.kernels.reference.delta_rule import decay, delta_rule
from llamaclust.kernels.reference.kv import Float64, LayerKv
from llamaclust.kernels.reference.mixing import gaussian_top_k, match_magnitude, mix, with_given_rows
from llamaclust.kernels.reference.scan import scan
from llamaclust.kernels.reference.states import StateMemory, convolve
from llamaclust.model import program as ir
from llamaclust.model.shard_names import shard_name
from llamaclust.model.steps.options import (
    LEAST_WEIGHT_SUM,
    SWIGLU_LIMIT,
    ActivationFunction,
    GatedActivation,
    Gating,
    RopeStyle,
)


@dataclass(slots=True)
class State:
    weights: Mapping[str, Float32]
    kv: Mapping[int, LayerKv]
    batch: Batch
    states: Mapping[ir.SequenceState, StateMemory] = field(default_factory=dict)
    buffers: dict[str, Float32] = field(default_factory=dict)

    def __getitem__(self, buffer: ir.Buffer) -> Float32:
        return self.buffers[buffer.name]

    def __setitem__(self, buffer: ir.Buffer, value: Float32 | Float64) -> None:
        assert value.shape[1] == buffer.width, (buffer, value.shape)
        with np.errstate(over="ignore"):
            self.buffers[buffer.name] = value.astype(np.float32)


def run_step(step: ir.Step, state: State) -> None:
    match step:
        case ir.Embed():
            state[step.out] = state.weights[step.weight][state.batch.tokens]
        case ir.MatMul():
            bias = state.weights[step.bias] if step.bias else None
            state[step.out] = matmul(state[step.x], state.weights[step.weight], bias)
        case ir.HeadMatMul():
            state[step.out] = head_matmul(step, state[step.x], state.weights[step.weight])
        case ir.Adapt():
            state[step.out] = adapt(step, state)
        case ir.Attention():
            state[step.out] = attention(step, state)
        case ir.Convolution():
            sequences = state.states[step.state].sequences(state.batch)
            state[step.out] = convolve(step, state[step.x], state.weights, sequences)
        case ir.DeltaRule():
            sequences = state.states[step.state].sequences(state.batch)
            state[step.out] = delta_rule(step, state.buffers, sequences)
        case ir.Decay():
            state[step.out] = decay(step, state[step.x], state.weights)
        case ir.Scan():
            sequences = state.states[step.state].sequences(state.batch)
            state[step.out] = scan(step, state[step.x], state[step.dt], state.weights, sequences)
        case ir.Moe():
            state[step.out] = moe(step, state)
        case ir.ExpertChoice():
            state[step.out] = expert_choice(step.mixture, state)
        case ir.ExpertShards():
            state[step.out] = expert_shards(step, state)
        case ir.ExpertInner() | ir.ExpertDown():
            state[step.out] = expert_part(step, state)
        case ir.ExpertSum():
            state[step.out] = expert_sum(step.mixture, state[step.choice], state[step.x])
        case ir.SelectRows():
            state[step.out] = state[step.x][state.batch.output_rows]
        case ir.GivenRows():
            state[step.out] = with_given_rows(step, state[step.x], state.batch)
        case ir.MergeRows():
            state[step.out] = state[step.x].reshape(-1, step.out.width)
        case ir.MeanRows():
            state[step.out] = of_heads(state[step.x].reshape(-1, step.factor * step.x.width), step.factor).mean(
                axis=1, dtype=np.float64
            )
        case ir.RmsNorm():
            norm_weight = state.weights[step.weight] if step.weight else np.ones(step.width, np.float32)
            state[step.out] = rms_norm(state[step.x], norm_weight, step.epsilon, step.heads)
        case ir.LayerNorm():
            bias = state.weights[step.bias] if step.bias else None
            state[step.out] = layer_norm(state[step.x], state.weights[step.weight], bias, step.epsilon)
        case ir.AddPosition():
            state[step.out] = state[step.x] + state.weights[step.weight][state.batch.positions]
        case ir.AddRow():
            state[step.out] = state[step.x] + state.weights[step.weight][step.row]
        case ir.Rope():
            state[step.x] = rope(step, state[step.x], state.batch)
        case ir.SiluMul():
            state[step.out] = silu(state[step.gate].astype(np.float64)) * state[step.up]
        case ir.Activate():
            state[step.out] = ACTIVATIONS[step.function](state[step.x].astype(np.float64))
        case ir.Add():
            state[step.out] = state[step.x] + state[step.y]
        case ir.Mul():
            state[step.out] = state[step.x] * state[step.y]
        case ir.Scale():
            state[step.out] = state[step.x] * np.float32(step.factor)
        case ir.ScaleByWeight():
            state[step.out] = state[step.x] * state.weights[step.weight]
        case ir.Clamp():
            x, low, high = state[step.x], state.weights[step.low], state.weights[step.high]
            raised = np.where(low > x, low, x)
            state[step.out] = np.where(high < raised, high, raised)
        case ir.PositionScale():
            factors = 1 + step.factor * np.log1p((state.batch.positions + step.offset) // step.length)
            state[step.out] = state[step.x] * factors[:, None].astype(np.float32)
        case ir.SoftCap():
            state[step.out] = soft_cap(state[step.x].astype(np.float64), step.cap)
        case ir.Slice():
            channels = slice(step.start, step.start + step.out.width // step.heads)
            state[step.out] = of_heads(state[step.x], step.heads)[:, :, channels].reshape(-1, step.out.width)
        case ir.Join():
            parts = [of_heads(state[part], step.heads) for part in (step.x, step.y)]
            state[step.out] = np.concatenate(parts, axis=2).reshape(-1, step.out.width)
        case ir.Mix():
            state[step.out] = mix(step, state.buffers)
        case ir.MatchMagnitude():
            state[step.out] = match_magnitude(step, state[step.x], state[step.y])
        case ir.GaussianTopK():
            state[step.out] = gaussian_top_k(state[step.x], step.factor)
        case ir.SigmoidGate():
            state[step.out] = state[step.y] * sigmoid(matmul(state[step.x], state.weights[step.weight][None]))


def of_heads(x: Float32, heads: int) -> Float32:
    return x.reshape(len(x), heads, x.shape[1] // heads)


def rms_norm(x: Float32, weight: Float32, epsilon: float, heads: int = 1) -> Float64:
    wide = x.reshape(len(x), heads, x.shape[1] // heads).astype(np.float64)
    mean: Float64 = np.mean(wide * wide, axis=2, keepdims=True)
    return (wide / np.sqrt(mean + epsilon) * weight.astype(np.float64)).reshape(x.shape)


def layer_norm(x: Float32, weight: Float32, bias: Float32 | None, epsilon: float) -> Float64:
    wide = x.astype(np.float64)
    centred: Float64 = wide - np.mean(wide, axis=1, keepdims=True)
    variance: Float64 = np.mean(centred * centred, axis=1, keepdims=True)
    out: Float64 = centred / np.sqrt(variance + epsilon) * weight.astype(np.float64)
    return out if bias is None else out + bias


def matmul(x: Float32, weight: Float32, bias: Float32 | None = None) -> Float64:
    """Returns x [rows, k] @ weight [n, k]^T (+ bias [n]). Avoids BLAS, whose order of sums may depend on other rows."""
    out: Float64 = np.einsum("rk,nk->rn", x.astype(np.float64), weight.astype(np.float64))
    return out if bias is None else out + bias


def head_matmul(step: ir.HeadMatMul, x: Float32, weight: Float32) -> Float64:
    heads = of_heads(x, step.heads).astype(np.float64)
    out: Float64 = np.einsum("rhk,hnk->rhn", heads, weight.astype(np.float64))
    return out.reshape(len(x), step.out.width)


def adapt(step: ir.Adapt, state: State) -> Float64:
    out: Float64 = state[step.out].astype(np.float64)
    if state.batch.adapter_scales is None:
        return out
    scales = state.batch.adapter_scales[:, step.adapter] * np.float32(step.factor)
    rows = np.flatnonzero(scales)
    if not len(rows):
        return out
    inner = matmul(state[step.x][rows], state.weights[step.down]).astype(np.float32) * scales[rows, None]
    out[rows] += matmul(inner, state.weights[step.up])
    return out


def silu(x: Float64) -> Float64:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)))


def sigmoid(x: Float64) -> Float64:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))


def gelu_erf(x: Float64) -> Float64:
    share = np.array([math.erf(value / math.sqrt(2)) for value in x.flat], np.float64).reshape(x.shape)
    return np.asarray(x / 2 * (1 + share))


def gelu_tanh(x: Float64) -> Float64:
    return np.asarray(x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def gelu_quick(x: Float64) -> Float64:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-1.702 * x)))


def relu_squared(x: Float64) -> Float64:
    return np.asarray(np.maximum(x, 0) ** 2)


ACTIVATIONS: Mapping[ActivationFunction, Callable[[Float64], Float64]] = {
    ActivationFunction.SILU: silu,
    ActivationFunction.GELU_ERF: gelu_erf,
    ActivationFunction.GELU_TANH: gelu_tanh,
    ActivationFunction.GELU_QUICK: gelu_quick,
    ActivationFunction.SIGMOID: sigmoid,
    ActivationFunction.RELU_SQUARED: relu_squared,
}


def rope(step: ir.Rope, x: Float32, batch: Batch) -> Float64:
    pairs = len(step.table.frequencies)
    angles = _rope_positions(step, batch)[:, None] * np.array(step.table.frequencies)
    cos, sin = np.cos(angles) * step.table.scale, np.sin(angles) * step.table.scale
    heads = x.reshape(len(x), step.heads, step.head_dim).astype(np.float64)
    if step.style is RopeStyle.NORM:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    out = heads.copy()
    out[:, :, first] = heads[:, :, first] * cos - heads[:, :, second] * sin
    out[:, :, second] = heads[:, :, first] * sin + heads[:, :, second] * cos
    return out.reshape(x.shape)


def _rope_positions(step: ir.Rope, batch: Batch) -> Int32:
    if step.sections is None or batch.rope_positions is None:
        return batch.positions[:, None]
    return batch.rope_positions[list(step.sections)].T


def attention(step: ir.Attention, state: State) -> Float32:
    """Computes attention after storing the rows' keys and values. A row sees its own position, earlier positions in its
    window, and all of its group. If attention is not causal, the row also sees later positions."""
    batch, kv = state.batch, state.kv[step.layer]
    tables = batch.window_tables if kv.windowed else batch.block_tables
    assert tables is not None
    sinks = state.weights[step.sinks] if step.sinks else None
    out = np.empty((batch.rows, step.out.width), np.float32)
    for sequence in range(len(batch.sequence_starts) - 1):
        rows = slice(batch.sequence_starts[sequence], batch.sequence_starts[sequence + 1])
        table = tables[batch.table_starts[sequence] : batch.table_starts[sequence + 1]]
        if not step.shares_kv:
            stored = None if step.v is None else state[step.v][rows]
            kv.store(table, batch.positions[rows], state[step.k][rows], stored)
        memory = Memory.of(step, kv, table, int(batch.positions[rows][-1]) + 1)
        for row in range(rows.start, rows.stop):
            own = int(batch.positions[row])
            group = range(own, own + 1) if batch.groups is None else range(*batch.groups[row].tolist())
            out[row] = attend(step, state[step.q][row], memory, own, group, sinks)
    return out


def moe(step: ir.Moe, state: State) -> Float64:
    choice = expert_choice(step, state)
    return expert_sum(step, choice, expert_results(step, state, choice, range(step.experts)))


def expert_choice(step: ir.Moe, state: State) -> Float32:
    """Returns the ids of the chosen experts, followed by their weights: [rows, 2 * used]."""
    weights, bias = state.weights, state.weights[step.router_bias] if step.router_bias else None
    scores = _SCORES[step.options.gating](matmul(state[step.routed or step.x], weights[step.router], bias))
    chosen = np.argsort(-_selection(step, scores, weights), axis=1, kind="stable")[:, : step.used]
    shares = np.take_along_axis(scores, chosen, axis=1)
    if step.options.gating is Gating.SOFTMAX_OF_CHOSEN:
        shares = softmax(shares)
    if step.options.normalized:
        shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), LEAST_WEIGHT_SUM)
    shares = shares * step.options.scale
    if step.expert_scales:
        shares = shares * weights[step.expert_scales][chosen]
    return np.concatenate((chosen, shares), axis=1, dtype=np.float32, casting="same_kind")


def expert_results(
    step: ir.Moe, state: State, choice: Float32, experts: range, given: Float32 | None = None
) -> Float32:
    """Returns the results of chosen experts [rows, used * width]. Results of experts outside `experts` are copied from
    `given`, or are 0."""
    x, width = state[step.x], step.out.width
    out = np.zeros((len(x), step.used * width), np.float32) if given is None else given.copy()
    for row, (ids, shares) in enumerate(zip(choice[:, : step.used].astype(int), choice[:, step.used :], strict=True)):
        for rank, expert in enumerate(ids):
            if expert in experts:
                weighed = x[row : row + 1] * (shares[rank] if step.options.weighs_inputs else np.float32(1))
                out[row, rank * width : (rank + 1) * width] = _expert(step, state.weights, int(expert), weighed)[0]
    return out


def expert_sum(step: ir.Moe, choice: Float32, results: Float32) -> Float64:
    shares = choice[:, step.used :, None].astype(np.float64)
    out = np.zeros((len(choice), step.out.width))
    for rank in range(step.used):
        part = of_heads(results, step.used)[:, rank]
        out += part if step.options.weighs_inputs else part * shares[:, rank]
    return out


def expert_shards(step: ir.ExpertShards, state: State) -> Float32:
    choice, mixture = state[step.choice], step.mixture
    names = *mixture.inner, mixture.down, *mixture.biases
    parts = {name: [state.weights[shard_name(name, shard)] for shard in step.shards] for name in names}
    before = {name: np.zeros((step.experts.start, *found[0].shape[1:]), np.float32) for name, found in parts.items()}
    weights = {name: np.concatenate((before[name], *found)) for name, found in parts.items()}
    given = None if step.given is None else state[step.given][:, -step.results_width :]
    results = expert_results(mixture, replace(state, weights=weights), choice, step.experts, given)
    if step.carried is None:
        return results
    return np.concatenate([*(state[buffer] for buffer in step.carried), choice, results], axis=1)


def _selection(step: ir.Moe, scores: Float64, weights: Mapping[str, Float32]) -> Float64:
    selection = scores + weights[step.selection_bias] if step.selection_bias else scores
    if step.options.groups == 1:
        return selection
    grouped = selection.reshape(len(scores), step.options.groups, -1)
    sums = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    groups = np.argsort(-sums, axis=1, kind="stable")[:, : step.options.used_groups]
    is_used = (np.arange(step.options.groups) == groups[:, :, None]).any(axis=1)
    return np.where(is_used[:, :, None], grouped, -np.inf).reshape(scores.shape)


def _same(x: Float64) -> Float64:
    return x


_SCORES: Mapping[Gating, Callable[[Float64], Float64]] = {
    Gating.SOFTMAX: softmax,
    Gating.SIGMOID: sigmoid,
    Gating.SOFTMAX_OF_CHOSEN: _same,
}


def clamped_swiglu(gate: Float64, up: Float64) -> Float64:
    gate, up = np.minimum(gate, SWIGLU_LIMIT), np.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * sigmoid(1.702 * gate) * (up + 1)


def silu_mul(gate: Float64, up: Float64) -> Float64:
    return silu(gate) * up


def gelu_mul(gate: Float64, up: Float64) -> Float64:
    return gelu_tanh(gate) * up


_GATED: Mapping[GatedActivation, Callable[[Float64, Float64], Float64]] = {
    GatedActivation.SILU_MUL: silu_mul,
    GatedActivation.GELU_MUL: gelu_mul,
    GatedActivation.CLAMPED_SWIGLU: clamped_swiglu,
}


def expert_part(step: ir.ExpertInner | ir.ExpertDown, state: State) -> Float32:
    choice, mixture, used = state[step.choice], step.mixture, step.mixture.used
    is_inner, compute = (True, _inner) if isinstance(step, ir.ExpertInner) else (False, _down)
    lines = np.repeat(state[step.x][:, None], used, axis=1) if is_inner else of_heads(state[step.x], used)
    out = np.empty((len(choice), used, step.out.width // used), np.float32)
    for row, (ids, shares) in enumerate(zip(choice[:, :used].astype(int), choice[:, used:], strict=True)):
        for rank, expert in enumerate(ids):
            weighs = is_inner and mixture.options.weighs_inputs
            line = lines[row, rank : rank + 1] * (shares[rank] if weighs else np.float32(1))
            out[row, rank] = compute(mixture, state.weights, int(expert), line)[0]
    return out.reshape(len(out), step.out.width)


def _expert(step: ir.Moe, weights: Mapping[str, Float32], expert: int, x: Float32) -> Float64:
    return _down(step, weights, expert, _inner(step, weights, expert, x).astype(np.float32))


def _inner(step: ir.Moe, weights: Mapping[str, Float32], expert: int, x: Float32) -> Float64:
    inner = _product(weights, expert, x, step.up, step.up_bias)
    if step.fused:
        return _GATED[GatedActivation(step.options.activation)](*np.split(inner, 2, axis=1))
    if step.gate is None:
        return ACTIVATIONS[ActivationFunction(step.options.activation)](inner)
    gate = _product(weights, expert, x, step.gate, step.gate_bias)
    return _GATED[GatedActivation(step.options.activation)](gate, inner)


def _down(step: ir.Moe, weights: Mapping[str, Float32], expert: int, x: Float32) -> Float64:
    return _product(weights, expert, x, step.down, step.down_bias)


def _product(weights: Mapping[str, Float32], expert: int, x: Float32, name: str, bias: str | None) -> Float64:
    return matmul(x, weights[name][expert], weights[bias][expert] if bias else None)
