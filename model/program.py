"""A stage as a program: a flat list of typed steps that an architecture emits and every backend runs. Buffers are
float32 matrices [rows, width]. Backends look up weights by their GGUF tensor names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from llamaclust.model.kv_type import KV_BLOCK_TOKENS
from llamaclust.model.steps.across import Exchange, Gather
from llamaclust.model.steps.attention import SPAN_TOKENS, Attention, Rope, RopeTable
from llamaclust.model.steps.mixtures import ExpertChoice, ExpertDown, ExpertInner, ExpertShards, ExpertSum, Moe
from llamaclust.model.steps.products import Adapt, HeadMatMul, MatMul
from llamaclust.model.steps.rows import (
    Activate,
    Add,
    AddPosition,
    AddRow,
    Clamp,
    Embed,
    GaussianTopK,
    GivenRows,
    Join,
    LayerNorm,
    MatchMagnitude,
    MeanRows,
    MergeRows,
    Mix,
    Mul,
    PositionScale,
    RmsNorm,
    Scale,
    ScaleByWeight,
    SelectRows,
    SigmoidGate,
    SiluMul,
    Slice,
    SoftCap,
)
from llamaclust.model.steps.states import Convolution, Decay, DeltaRule, Scan, SequenceState, StatePart
from llamaclust.model.steps.step import Buffer

__all__ = [
    "KV_BLOCK_TOKENS",
    "SPAN_TOKENS",
    "Activate",
    "Adapt",
    "Add",
    "AddPosition",
    "AddRow",
    "Attention",
    "Buffer",
    "Clamp",
    "Convolution",
    "Decay",
    "DeltaRule",
    "Embed",
    "Exchange",
    "ExpertChoice",
    "ExpertDown",
    "ExpertInner",
    "ExpertShards",
    "ExpertSum",
    "Gather",
    "GaussianTopK",
    "GivenRows",
    "HeadMatMul",
    "Join",
    "LayerNorm",
    "MatMul",
    "MatchMagnitude",
    "MeanRows",
    "MergeRows",
    "Mix",
    "Moe",
    "Mul",
    "PositionScale",
    "RmsNorm",
    "Rope",
    "RopeTable",
    "Scale",
    "ScaleByWeight",
    "Scan",
    "SelectRows",
    "SequenceState",
    "SigmoidGate",
    "SiluMul",
    "Slice",
    "SoftCap",
    "StatePart",
]  # The names that this file defines are public too.

LOGITS = "logits"

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
    | ScaleByWeight
    | Clamp
    | Mix
    | MatchMagnitude
    | GaussianTopK
    | GivenRows
    | PositionScale
    | SoftCap
    | Slice
    | Join
    | SigmoidGate
    | Decay
)
"""Steps that compute row r of `out` from row r of the inputs. They may also read the batch and weight vectors."""

FewerRows = MergeRows | MeanRows

StateStep = Convolution | DeltaRule | Scan

MixtureStep = ExpertChoice | ExpertInner | ExpertDown | ExpertShards | ExpertSum

Across = Exchange | Gather
"""Steps whose result is partly computed on another device, or on another member of a group."""

RowsChange = SelectRows | FewerRows

Step = Embed | MatMul | HeadMatMul | Adapt | Attention | StateStep | Moe | MixtureStep | Across | RowsChange | RowStep

KvLayer = Attention | SequenceState
"""Steps and states that have KV memory. A layer has at most one attention and at most one state of each `StatePart`."""


@dataclass(frozen=True, slots=True)
class Program:
    """The steps of layers [start, end). If layers are divided into `shards` parts, start and end count parts (see
    `expert_shards`). The first stage begins with `Embed`, and other stages receive `hidden`. The last stage writes the
    logits to `out` [output rows, vocabulary], and other stages write the hidden state [rows, embedding]. On the last
    stage, `normed` is the normed hidden state [rows, embedding] of every row, or a reranker's scores [rows, classes].
    Encoders and rerankers have no logits."""

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
        return range(self.start // self.shards, -(-self.end // self.shards))

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.layers

    @property
    def weights(self) -> tuple[str, ...]:
        return weights_of(self.steps)

    @property
    def kv_layers(self) -> tuple[Attention, ...]:
        return tuple(kept for kept in self.kv_memory if isinstance(kept, Attention))

    @property
    def kv_memory(self) -> tuple[KvLayer, ...]:
        """The recurrent states, and each layer's first attention step that stores keys and values."""
        kept: list[KvLayer] = []
        layers: set[int] = set()
        for step in self.steps:
            state = getattr(step, "state", None)
            if isinstance(state, SequenceState):
                kept.append(state)
            elif isinstance(step, Attention) and not step.shares_kv and step.layer not in layers:
                layers.add(step.layer)
                kept.append(step)
        return tuple(kept)

    @property
    def has_states(self) -> bool:
        return bool(self.states)

    @property
    def states(self) -> tuple[SequenceState, ...]:
        return tuple(kept for kept in self.kv_memory if isinstance(kept, SequenceState))

    @property
    def rows_together(self) -> int:
        """The number of input rows that are merged into one row of `out`. `SelectRows` is not counted."""
        return prod(step.factor for step in self.steps if isinstance(step, FewerRows))

    @property
    def rope_sections(self) -> int:
        """The number of position sections in RoPE, such as 3 for time, height and width. 0 means that a token has one
        position."""
        sections = (step.sections for step in self.steps if isinstance(step, Rope) and step.sections is not None)
        return max((max(each) + 1 for each in sections), default=0)

    @property
    def given_levels(self) -> int:
        return max((step.level + 1 for step in self.steps if isinstance(step, GivenRows)), default=0)

    @property
    def given_width(self) -> int:
        return next((step.out.width for step in self.steps if isinstance(step, GivenRows)), 0)

    @property
    def is_causal(self) -> bool:
        """True if no row attends to later positions, so that a sequence may be computed in chunks."""
        return all(step.causal for step in self.kv_layers)

    @property
    def has_logits(self) -> bool:
        return self.is_last and self.out.name == LOGITS

    @property
    def window(self) -> int | None:
        """The largest sliding window of causal attention, or None. KV memory outside this window is released."""
        return max((kept.window for kept in self.kv_layers if kept.causal and kept.window is not None), default=None)


def weights_of(steps: Iterable[Step]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(weight.name for step in steps for weight in step.weights))


def read_before_written(steps: Iterable[Step], *results: Buffer | None) -> tuple[Buffer, ...]:
    """Returns the buffers that are read before a step writes them, in order of the reads. `results` are read last."""
    found: dict[str, Buffer] = {}
    written: set[str] = set()
    for step in steps:
        found |= {buffer.name: buffer for buffer in step.reads if buffer.name not in written | found.keys()}
        written.add(step.out.name)
    for result in results:
        if result is not None and result.name not in written | found.keys():
            found[result.name] = result
    return tuple(found.values())
