"""Steps that compute a row from the same row of other buffers, without weights or with a weight vector."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.steps.options import ActivationFunction
from llamaclust.model.steps.step import (
    WHOLE,
    BinaryStep,
    Buffer,
    DivisionRule,
    StepFacts,
    StepWeight,
    UnaryStep,
    by_heads,
    optional_weight,
)


@dataclass(frozen=True, slots=True)
class Embed(StepFacts):
    """Looks up embeddings: out[r] = row tokens[r] of `weight`, dequantized to float32."""

    out: Buffer
    weight: str

    is_embedding = True

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return ()

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return (StepWeight(self.weight, (-1, self.out.width)),)


@dataclass(frozen=True, slots=True)
class RmsNorm(UnaryStep):
    """out = x / sqrt(mean(x^2) + epsilon) * weight for each of the `heads` equal parts of a row. weight is [x.width /
    heads] for all parts, or [heads, x.width / heads] if `own_weights`, or None. out may alias x."""

    weight: str | None
    epsilon: float
    heads: int = 1
    own_weights: bool = False

    @property
    def width(self) -> int:
        return self.x.width // self.heads

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        heads = (self.heads,) if self.own_weights else ()
        return optional_weight(self.weight, *heads, self.width)

    @property
    def division(self) -> DivisionRule:
        return WHOLE if self.own_weights else by_heads(self.reads, self.heads)


@dataclass(frozen=True, slots=True)
class LayerNorm(UnaryStep):
    """out = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight (+ bias) for each row. out may alias x."""

    weight: str
    bias: str | None
    epsilon: float

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return StepWeight(self.weight, (self.x.width,)), *optional_weight(self.bias, self.x.width)


@dataclass(frozen=True, slots=True)
class AddPosition(UnaryStep):
    """Adds learned positions: out[r] = x[r] + dequantized row positions[r] of `weight`. out must not alias x."""

    weight: str

    is_embedding = True

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return (StepWeight(self.weight, (-1, self.out.width)),)


@dataclass(frozen=True, slots=True)
class AddRow(UnaryStep):
    """Adds the dequantized row number `row` of `weight` to all rows of x. out must not alias x."""

    weight: str
    row: int

    is_embedding = True

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return (StepWeight(self.weight, (-1, self.out.width)),)


@dataclass(frozen=True, slots=True)
class SiluMul(StepFacts):
    """out = silu(gate) * up. out may alias gate."""

    gate: Buffer
    up: Buffer
    out: Buffer

    is_elementwise = True

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.gate, self.up


@dataclass(frozen=True, slots=True)
class Activate(UnaryStep):
    """Applies an activation function: out = function(x). out may alias x."""

    function: ActivationFunction

    is_elementwise = True


@dataclass(frozen=True, slots=True)
class Add(BinaryStep):
    """out = x + y. out may alias x."""

    is_elementwise = True


@dataclass(frozen=True, slots=True)
class Mul(BinaryStep):
    """out = x * y. out may alias x."""

    is_elementwise = True


@dataclass(frozen=True, slots=True)
class Scale(UnaryStep):
    """out = x * factor, where factor is a float32. out may alias x."""

    factor: float

    is_elementwise = True


@dataclass(frozen=True, slots=True)
class PositionScale(UnaryStep):
    """out = x * (1 + factor * ln(1 + (position + offset) // length)), with a float32 factor. out may alias x."""

    factor: float
    length: int
    offset: int = 0

    is_elementwise = True


@dataclass(frozen=True, slots=True)
class SoftCap(UnaryStep):
    """out = cap * tanh(x / cap). out may alias x."""

    cap: float

    is_elementwise = True


@dataclass(frozen=True, slots=True)
class Slice(UnaryStep):
    """out = the channels [start, start + out.width) of x, or of each of the `heads` equal parts of x."""

    start: int
    heads: int = 1

    @property
    def division(self) -> DivisionRule:
        return by_heads(self.reads, self.heads)


@dataclass(frozen=True, slots=True)
class Join(BinaryStep):
    """Joins the channels of x and y, separately for each of `heads` equal parts. out must not alias x or y."""

    heads: int = 1

    @property
    def division(self) -> DivisionRule:
        return by_heads(self.reads, self.heads)


@dataclass(frozen=True, slots=True)
class ScaleByWeight(UnaryStep):
    """out = x * weight. weight is [1], or [x.width] if `by_channel`. out may alias x."""

    weight: str
    by_channel: bool = False

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return (StepWeight(self.weight, (self.x.width if self.by_channel else 1,)),)


@dataclass(frozen=True, slots=True)
class Clamp(UnaryStep):
    """out = min(max(x, low), high), NaN for NaN. low and high are weights [1]. out may alias x."""

    low: str
    high: str

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return StepWeight(self.low, (1,)), StepWeight(self.high, (1,))


@dataclass(frozen=True, slots=True)
class Mix(BinaryStep):
    """Adds a weighted sum of the parts of x to each part of y, where parts have `width` channels: out_i = y_i + the sum
    over j of (coefficients[i, j] + offset) * x_j. Without coefficients, each part of x is added with weight 1. The
    first `first` parts of y are copied. coefficients is [rows, parts of out * parts of x]. out may alias y, but not
    x or coefficients."""

    width: int
    coefficients: Buffer | None = None
    offset: float = 0.0
    first: int = 0

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.x, self.y) if self.coefficients is None else (self.x, self.y, self.coefficients)


@dataclass(frozen=True, slots=True)
class MatchMagnitude(BinaryStep):
    """Scales each part of x to the root mean square of y, where parts are as wide as y: out_i = x_i * sqrt(mean(y^2)) /
    sqrt(max(mean(x_i^2), epsilon)). out may alias x."""

    epsilon: float


@dataclass(frozen=True, slots=True)
class GaussianTopK(UnaryStep):
    """out = max(x - (mean(x) + factor * standard deviation of x), 0) for each row. out may alias x."""

    factor: float


@dataclass(frozen=True, slots=True)
class SigmoidGate(BinaryStep):
    """out = y * sigmoid(x . weight), with one gate for each row. weight is [x.width]. out may alias y."""

    weight: str

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return (StepWeight(self.weight, (self.x.width,)),)

    @property
    def division(self) -> DivisionRule:
        return DivisionRule((self.y,))


@dataclass(frozen=True, slots=True)
class SelectRows(UnaryStep):
    """Keeps only the rows of x whose logits are needed. Later steps have only these rows."""


@dataclass(frozen=True, slots=True)
class GivenRows(UnaryStep):
    """Replaces rows of x by rows from the batch, such as an image's embeddings. If `adds`, adds them to x instead.
    Other rows are copied. The step uses channels [level * x.width, (level + 1) * x.width) of the batch's rows. out may
    alias x."""

    level: int = 0
    adds: bool = False


@dataclass(frozen=True, slots=True)
class _FewerRows(UnaryStep):
    """A step that combines `factor` consecutive rows of a sequence into one row. Later steps have only the new rows."""

    factor: int


@dataclass(frozen=True, slots=True)
class MergeRows(_FewerRows):
    """Joins every `factor` rows of x: out[r] = x[factor * r : factor * (r + 1)]. out.width = factor * x.width."""


@dataclass(frozen=True, slots=True)
class MeanRows(_FewerRows):
    """out[r] = the sum of rows [factor * r, factor * (r + 1)) of x in ascending order, times 1 / factor as float32."""
