from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from llamaclust.cluster.planner.context import ContextChoice
from llamaclust.core.gpus import DeviceLayers
from llamaclust.model.program import KV_BLOCK_TOKENS

_PROMPT_TOKENS = 512
ANSWER_TOKENS: Final = 128


def usual_prompt_tokens(context_length: int) -> int:
    return min(_PROMPT_TOKENS, context_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLayers:
    start: int
    end: int
    weight_bytes: int
    # Bytes of weights that are read to decode one token. Experts that are not chosen and the embedding do not count.
    touched_bytes: int
    kv_bytes: int
    workspace_bytes: int
    memory_bytes: int | None  # Memory that the worker may use. None: unknown.

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan(HeldLayers):
    device: str
    cpu_moe: tuple[int, ...] = ()  # Layers on a GPU whose experts are in RAM.
    # True if this entry is in RAM and holds only routers and experts of the layers in `cpu_moe`.
    is_experts: bool = False
    experts_cache_bytes: int = 0  # GPU memory for copies of experts that are in RAM and often used.


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan(HeldLayers):
    """The layers that a plan gives to one worker. A group member holds a portion of each layer of its group."""

    worker: str
    # Share of each group member in every layer, such as (2, 1). Empty: the worker holds the layers alone.
    shares: tuple[int, ...] = ()
    member: int = 0  # Index of the member in its group. 0: the leader.
    # Parts by device if the worker has GPUs. The values above are sums of the parts.
    devices: tuple[DevicePlan, ...] = ()
    # RAM of the image encoder (weights and workspace). 0: no encoder.
    encoder_bytes: int = 0

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
    decode_s: float  # Seconds per token of one sequence. Waits between group members are not included.
    prefill_s: float  # Seconds per prompt token.
    gathers_s: float = 0.0  # The part of `decode_s` that a group spends in gathers.


@dataclass(frozen=True, slots=True)
class Round:
    """A speculative step for one sequence. It computes the last known token and `drafted` drafted tokens."""

    drafted: int
    seconds: float  # Seconds until the tokens of the round are known.
    # Seconds of the slowest stage or link, after which the next round can begin. Equals `seconds` if rounds cannot
    # overlap.
    slowest_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    stages: tuple[StagePrediction, ...]  # One entry per entry of `Plan.stages`.
    token_s: float  # Seconds per token of one sequence alone.
    links_s: float  # The part of `token_s` that is spent in transfers between stages.
    ttft_s: float  # Seconds to the first token, for a prompt of `prompt_tokens` tokens.
    tokens_per_s: float  # Total tokens per second with the maximum number of sequences.
    bottleneck: str  # Worker whose stage takes longest.
    # In ascending order of drafted tokens. Empty: no drafts, or layers with states.
    rounds: tuple[Round, ...] = ()
    gathers_s: float = 0.0  # The part of `token_s` that groups spend in gathers.

    @property
    def answer_s(self) -> float:
        return self.ttft_s + (ANSWER_TOKENS - 1) * self.token_s


@dataclass(frozen=True, slots=True)
class RejectedGroup:
    workers: tuple[str, ...]  # Members, starting with the leader.
    shares: tuple[int, ...]
    prediction: Prediction
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a model. `stages` has one entry per worker that holds layers."""

    stages: tuple[StagePlan, ...]
    kv_blocks: int
    context: ContextChoice
    idle_workers: tuple[IdleWorker, ...]
    prediction: Prediction | None  # None if some value was not measured.
    # Number of KV blocks that the plan would have with the shortest context, for comparisons of plans.
    least_kv_blocks: int = 0
    # Number of blocks for layers with a sliding window, if they have separate blocks.
    window_blocks: int = 0
    state_blocks: int = 0
    # Maximum relative distance from the optimum. None: the plan is optimal or manual.
    optimality_gap: float | None = None
    unused_gpus: tuple[UnusedGpu, ...] = ()
    expert_shards: int = 1  # Number of parts per layer. Starts and ends of stages count parts.
    wide_tiles: bool = False  # True if some weights are in wider tiles, which take more memory and less time.
    objective: str | None = None
    # Prediction for the best plan without groups, if an automatic plan has groups.
    without_groups: Prediction | None = None
    rejected_group: RejectedGroup | None = field(default=None, compare=False)  # Set only in plans without groups.
    no_group: str = field(default="", compare=False)  # Reason why no group is possible.
    no_images: str = field(default="", compare=False)  # Reason why no worker holds the image encoder.

    @property
    def context_length(self) -> int:
        return self.context.tokens

    @property
    def lacks_kv_memory(self) -> bool:
        """True if KV memory holds no full-length sequence, because workers were lost after the context was chosen."""
        return self.kv_blocks * KV_BLOCK_TOKENS < self.context_length

    @property
    def missing_kv_bytes(self) -> int:
        """Bytes of KV memory that a sequence of full length needs in addition."""
        missing_blocks = max(0, -(-self.context_length // KV_BLOCK_TOKENS) - self.kv_blocks)
        return missing_blocks * -(-sum(stage.kv_bytes for stage in self.stages) // max(1, self.kv_blocks))

    @property
    def has_encoder(self) -> bool:
        return any(stage.encoder_bytes for stage in self.stages)

    @property
    def leaders(self) -> tuple[StagePlan, ...]:
        """The entries of the leading workers, one per stage. A leader receives and sends the messages of its stage."""
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
