"""A stage as a program: the flat list of typed steps that an architecture emits and every backend runs.

Buffers are float32 matrices [rows, width]. All rows of a microbatch go through a step, until `SelectRows` keeps only
the rows whose logits are wanted. Weights are named by their GGUF tensor names; a backend looks them up at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llamaclust.model.delta_rule import Decay, DeltaRule
from llamaclust.model.groups.gather import Gather
from llamaclust.model.kv_type import KV_BLOCK_TOKENS, KvType
from llamaclust.model.mixtures.exchange import Exchange
from llamaclust.model.mixtures.steps import ExpertChoice, ExpertDown, ExpertInner, ExpertShards, ExpertSum, Moe
from llamaclust.model.row_steps import (
    Activate,
    Add,
    Buffer,
    GaussianTopK,
    Join,
    MatchMagnitude,
    Mix,
    MixingStep,
    Mul,
    PositionScale,
    Scale,
    ScaleByWeight,
    SiluMul,
    Slice,
    SoftCap,
)
from llamaclust.model.scan import Scan
from llamaclust.model.states import Convolution, SequenceState, StatePart
from llamaclust.model.step_options import RopeStyle

__all__ = [
    "KV_BLOCK_TOKENS",
    "Activate",
    "Add",
    "Buffer",
    "Convolution",
    "Decay",
    "DeltaRule",
    "Exchange",
    "ExpertChoice",
    "ExpertDown",
    "ExpertInner",
    "ExpertShards",
    "ExpertSum",
    "Gather",
    "GaussianTopK",
    "Join",
    "MatchMagnitude",
    "Mix",
    "Moe",
    "Mul",
    "PositionScale",
    "Scale",
    "ScaleByWeight",
    "Scan",
    "SequenceState",
    "SiluMul",
    "Slice",
    "SoftCap",
    "StatePart",
]  # beside what is defined here

LOGITS = "logits"
"""The buffer of a last stage's results, where it has a head."""

SPAN_TOKENS = 512
"""Positions in one attention span, counted from absolute position 0: a span is computed whole, spans merge in order."""


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotation angles: angle(position, i) = position * frequencies[i], both factors float64; cos and sin times `scale`.
    The rotary_dim / 2 `frequencies` are computed in decimal arithmetic, so they are the same on every machine."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Embed:
    """out[r] = dequantized row tokens[r] of `weight`, in float32."""

    out: Buffer
    weight: str


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """out = x / sqrt(mean(x^2) + epsilon) * weight, a row at a time, or each of a row's `heads` equal parts by itself,
    all with the same weight [x.width / heads], or with none, or with `own_weights` [heads, x.width / heads]; out may be
    x."""

    x: Buffer
    out: Buffer
    weight: str | None
    epsilon: float
    heads: int = 1
    own_weights: bool = False

    @property
    def width(self) -> int:
        """Channels that are normed together."""
        return self.x.width // self.heads


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """out = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight (+ bias), a row at a time; out may be x."""

    x: Buffer
    out: Buffer
    weight: str
    bias: str | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class AddPosition:
    """out[r] = x[r] + dequantized row positions[r] of `weight`; out is not x."""

    x: Buffer
    out: Buffer
    weight: str


@dataclass(frozen=True, slots=True)
class AddRow:
    """out = x + dequantized row `row` of `weight`, the same for all rows of x; out is not x."""

    x: Buffer
    out: Buffer
    weight: str
    row: int


@dataclass(frozen=True, slots=True)
class MatMul:
    """out = x @ weight^T (+ bias), weight [out.width, x.width] in GGUF's row order."""

    x: Buffer
    out: Buffer
    weight: str
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class HeadMatMul:
    """Each of a row's `heads` equal parts by a matrix of its own: out_h = x_h @ weight_h^T, weight [heads, out.width /
    heads, x.width / heads] in GGUF's row order."""

    x: Buffer
    out: Buffer
    weight: str
    heads: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the weight."""
        return self.heads, self.out.width // self.heads, self.x.width // self.heads


@dataclass(frozen=True, slots=True)
class Adapt:
    """out += scale * (x @ down^T) @ up^T, which an adapter of LoRA adds to a product: `scale` is `factor` times what
    the batch has for the row and this adapter. Where that is 0, the row stays as it is.

    down [rank, x.width], up [out.width, rank].
    """

    x: Buffer
    out: Buffer
    adapter: int
    down: str
    up: str
    rank: int
    factor: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotates the first 2 * len(table.frequencies) channels of each head of x in place, by the row's position."""

    x: Buffer
    heads: int
    head_dim: int
    style: RopeStyle
    table: RopeTable


@dataclass(frozen=True, slots=True)
class Attention:
    """Rounds k and v to the KV type, stores them at the rows' positions in KV memory of `layer`, then out = attention.

    q, out [rows, heads * head_dim]; k, v [rows, kv_heads * head_dim]; query head h reads KV head
    h // (heads / kv_heads). A row sees its own position and all of its sequence before it, or the `window` - 1 before
    it; if `chunked`, those from the last multiple of `window` on. scores = (q . k) * scale, of which `soft_cap` makes
    soft_cap * tanh(scores / soft_cap). `slopes`, one a query head, add a linear bias: -slope * the distance.

    Without v, attention is latent: one KV head, whose values are the first channels of its keys, stored once; out
    [rows, heads * so many]; neither window nor slopes.

    Without `causal`, a row sees all of its sequence, which is in one microbatch as a whole; or with a `window` the
    positions at most window // 2 before and behind its own.

    `sinks` [heads]: a score for each query head that takes part in the softmax, without a value.

    With `shares_kv`, an earlier step has stored the keys and values of `layer`: k and v are not read.
    """

    q: Buffer
    k: Buffer
    v: Buffer | None
    out: Buffer
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    kv_type: KvType = KvType.F16
    window: int | None = None
    soft_cap: float | None = None
    slopes: tuple[float, ...] | None = None
    causal: bool = True
    sinks: str | None = None
    shares_kv: bool = False
    chunked: bool = False

    @property
    def value_dim(self) -> int:
        """Channels of a value."""
        return self.out.width // max(self.heads, 1)

    @property
    def kv_token_bytes(self) -> int:
        """KV memory of one position."""
        bytes_of = self.kv_type.key_bytes if self.v is None else self.kv_type.pair_bytes
        return self.kv_heads * bytes_of(self.head_dim)


@dataclass(frozen=True, slots=True)
class SigmoidGate:
    """out = y * 1 / (1 + exp(-x . weight)), weight [x.width]: one number weighs a whole row; out may be y."""

    x: Buffer
    y: Buffer
    out: Buffer
    weight: str


@dataclass(frozen=True, slots=True)
class SelectRows:
    """out = the rows of x whose logits are wanted (the microbatch's output rows); every later step has only these."""

    x: Buffer
    out: Buffer


RowStep = (
    RmsNorm
    | LayerNorm
    | AddPosition
    | AddRow
    | Rope
    | SiluMul
    | Activate
    | Add
    | Mul
    | Scale
    | MixingStep
    | PositionScale
    | SoftCap
    | Slice
    | Join
    | SigmoidGate
    | Decay
)
"""Steps that compute a row of the out buffer from the same row of others, its position and weights of one row."""

StateStep = Convolution | DeltaRule | Scan
"""Steps that keep a state of each sequence."""

MixtureStep = ExpertChoice | ExpertInner | ExpertDown | ExpertShards | ExpertSum
"""Steps of a mixture whose experts are on several stages, or divided among the members of a group."""

Across = Exchange | Gather
"""Steps of which another device, or another member of a group, computes a part."""

Step = Embed | MatMul | HeadMatMul | Adapt | Attention | StateStep | Moe | MixtureStep | Across | SelectRows | RowStep

KvLayer = Attention | SequenceState
"""What a part of KV memory is laid out for: of each layer at most one attention, and one state of each part."""


@dataclass(frozen=True, slots=True)
class Program:
    """The steps of layers [start, end) of a model, or of parts [start, end) where the experts of each layer are divided
    into `shards`, which are the parts of their layer: the first one has all that comes before experts, the last one all
    that comes behind.

    The first stage begins with `Embed`, others are given `hidden_in`; the last stage ends with the logits in `out`
    [output rows, vocabulary], others with the hidden state [rows, embedding]. On the last stage, `normed` [rows,
    embedding] is the normed hidden state of every row, written before `SelectRows`; in a model that ranks documents
    [rows, classes], the scores. Encoders and rerankers have no logits.
    """

    start: int
    end: int
    layers: int
    hidden: Buffer
    out: Buffer
    steps: tuple[Step, ...]
    normed: Buffer | None = None
    shards: int = 1

    @property
    def layer_range(self) -> range:
        """The layers that it has parts of."""
        return range(self.start // self.shards, -(-self.end // self.shards))

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.layers

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of every tensor the steps read, in first-use order, each once."""
        return weights_of(self.steps)

    @property
    def kv_layers(self) -> tuple[Attention, ...]:
        """The attention steps that store keys and values, one a layer: what KV memory is laid out for."""
        return tuple(step for step in self.steps if isinstance(step, Attention) and not step.shares_kv)

    @property
    def kv_memory(self) -> tuple[KvLayer, ...]:
        """What KV memory is laid out for, in the order of steps."""
        kept = (step if isinstance(step, Attention) else getattr(step, "state", None) for step in self.steps)
        return tuple(k for k in kept if isinstance(k, SequenceState) or (isinstance(k, Attention) and not k.shares_kv))

    @property
    def has_states(self) -> bool:
        return bool(self.states)

    @property
    def states(self) -> tuple[SequenceState, ...]:
        """The states of sequences that its steps update."""
        return tuple(kept for kept in self.kv_memory if isinstance(kept, SequenceState))

    @property
    def is_causal(self) -> bool:
        """Whether rows see nothing behind them: then a sequence may be computed in chunks."""
        return all(step.causal for step in self.kv_layers)

    @property
    def has_logits(self) -> bool:
        """Whether a last stage ends with logits."""
        return self.is_last and self.out.name == LOGITS

    @property
    def window(self) -> int | None:
        """The largest window of its causal layers, if any has one: behind it they give up KV memory. The others need
        their whole prompt in one microbatch."""
        return max((kept.window for kept in self.kv_layers if kept.causal and kept.window is not None), default=None)


_WEIGHT_FIELDS = (
    *("weight", "bias", "sinks", "router", "router_bias", "selection_bias", "expert_scales"),
    *("gate", "gate_bias", "up", "up_bias", "down", "down_bias", "decay", "skip"),
)


def weights_of(steps: Iterable[Step]) -> tuple[str, ...]:
    """Names of every tensor the steps read, in first-use order, each once."""
    names = (name for step in steps for name in _weights_of(step))
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))


def _weights_of(step: Step) -> Iterator[str | None]:
    if isinstance(step, MixtureStep):
        yield from step.weights
    else:
        yield from (getattr(step, field, None) for field in _WEIGHT_FIELDS)
