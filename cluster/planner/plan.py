"""Values that describe a plan: each worker's layers and memory, and the predicted speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from llamaclust.core.gpus import DeviceLayers

_PROMPT_TOKENS = 512
ANSWER_TOKENS: Final = 128


def usual_prompt_tokens(context_length: int) -> int:
    return min(_PROMPT_TOKENS, context_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLayers:
    start: int
    end: int
    weight_bytes: int
    touched_bytes: int  # weights that a token of one sequence reads: chosen experts, no embedding
    kv_bytes: int
    workspace_bytes: int
    memory_bytes: int | None  # memory that the worker may take; None: unknown

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan(HeldLayers):
    device: str
    cpu_moe: tuple[int, ...] = ()  # a GPU's layers with experts in RAM
    is_experts: bool = False  # in RAM, only routers and experts of `cpu_moe`
    experts_cache_bytes: int = 0  # a GPU's memory for copies of often used experts in RAM


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan(HeldLayers):
    """A worker's layers, or its portion of a group's layers. Members of a group are consecutive in a plan."""

    worker: str
    shares: tuple[int, ...] = ()  # shares of output rows by member of the group; (): the worker holds the layers alone
    member: int = 0  # number of the member; 0: the leader
    devices: tuple[DevicePlan, ...] = ()  # parts by device of a worker with GPUs; the figures above are their sums
    encoder_bytes: int = 0  # RAM of the encoder of images (weights and workspace); 0: no encoder

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes + self.encoder_bytes

    @property
    def device_layers(self) -> tuple[DeviceLayers, ...]:
        parts = (part for part in self.devices if not part.is_experts)
        return tuple(
            DeviceLayers(part.device, part.start, part.end, part.cpu_moe, part.experts_cache_bytes) for part in parts
        )


@dataclass(frozen=True, slots=True)
class IdleWorker:
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnusedGpu:
    worker: str
    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class StagePrediction:
    decode_s: float  # one token of one sequence; a group member's waits do not count
    prefill_s: float  # each prompt token
    gathers_s: float = 0.0  # the part of `decode_s` in a group's gathers


@dataclass(frozen=True, slots=True)
class Round:
    """A speculative step for one sequence. It computes the last known token and `drafted` drafted tokens."""

    drafted: int
    seconds: float  # time until the round's tokens are known
    slowest_s: float  # time until the next round may begin: that of the slowest stage or link, or of all


@dataclass(frozen=True, slots=True)
class Prediction:
    stages: tuple[StagePrediction, ...]  # one for each entry of the plan
    token_s: float  # seconds per token of one sequence alone
    links_s: float  # the part of `token_s` in transfers between stages
    ttft_s: float  # first token after a prompt of `prompt_tokens`
    tokens_per_s: float  # throughput of all sequences that may run together
    bottleneck: str  # the worker whose stage takes longest
    rounds: tuple[Round, ...] = ()  # ascending by drafted tokens; empty: no drafts, or layers with states
    gathers_s: float = 0.0  # the part of `token_s` in groups' gathers

    @property
    def answer_s(self) -> float:
        return self.ttft_s + (ANSWER_TOKENS - 1) * self.token_s


@dataclass(frozen=True, slots=True)
class RejectedGroup:
    workers: tuple[str, ...]  # the leader first
    shares: tuple[int, ...]
    prediction: Prediction
    reason: str  # why the plan has no group


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages, from the embedding to the head. `stages` has one entry for each worker that holds layers."""

    stages: tuple[StagePlan, ...]
    kv_blocks: int
    context_length: int
    idle_workers: tuple[IdleWorker, ...]
    prediction: Prediction | None  # None if something was not measured
    window_blocks: int = 0  # blocks of layers with a window, if these have blocks of their own
    state_blocks: int = 0  # blocks of states of sequences
    optimality_gap: float | None = None  # most distance from the optimum; None: the optimum, or a manual plan
    unused_gpus: tuple[UnusedGpu, ...] = ()
    expert_shards: int = 1  # parts of a layer in which starts and ends of stages are counted
    wide_tiles: bool = False  # some weights are in wider tiles: more memory, less time
    objective: str | None = None  # objective of an automatic plan
    without_groups: Prediction | None = (
        None  # prediction of the best plan without groups, if an automatic plan has groups
    )
    rejected_group: RejectedGroup | None = field(default=None, compare=False)  # only in plans without groups
    no_group: str = field(default="", compare=False)  # why no group of the workers is possible
    no_images: str = field(default="", compare=False)  # why no worker holds the model's encoder of images

    @property
    def has_encoder(self) -> bool:
        return any(stage.encoder_bytes for stage in self.stages)

    @property
    def leaders(self) -> tuple[StagePlan, ...]:
        """The first entry of each stage. This entry's worker receives and sends the stage's streams."""
        return tuple(stage for stage in self.stages if stage.member == 0)

    @property
    def by_stage(self) -> tuple[tuple[StagePlan, ...], ...]:
        starts = [place for place, stage in enumerate(self.stages) if stage.member == 0]
        return tuple(self.stages[start:end] for start, end in pairwise((*starts, len(self.stages))))

    @property
    def chain(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(stage.worker for stage in stages) for stages in self.by_stage)

    @property
    def prompt_tokens(self) -> int:
        return usual_prompt_tokens(self.context_length)
