"""The hyperparameters of a model. `model_keys.py` reads them from the model's metadata."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_LAYERS = 1 << 10
PROJECTOR_ARCHITECTURE = "clip"


class RopeScaling(StrEnum):
    NONE = "none"
    LINEAR = "linear"
    LONGROPE = "longrope"  # Linear scaling, and a factor from a tensor for each channel pair.
    YARN = "yarn"


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """RoPE of the first `dimension_count` channels of a head. Only YaRN uses `extrapolation_factor`, `beta_fast`,
    `beta_slow`, `log_multiplier` and `truncated`."""

    dimension_count: int
    frequency_base: float
    scaling: RopeScaling
    factor: float
    original_context_length: int
    attention_factor: float
    extrapolation_factor: float
    beta_fast: float
    beta_slow: float
    log_multiplier: float = 0.0
    truncated: bool = True


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Widths (in channels) and counts of a model. Tuples have one number for each layer. 0 means no attention in
    `head_counts_kv`, no feed-forward network in `feed_forward_lengths`, and no experts in `expert_count`."""

    architecture: str
    block_count: int
    context_length: int
    embedding_length: int
    feed_forward_lengths: tuple[int, ...]
    head_count: int
    head_counts_kv: tuple[int, ...]
    key_length: int
    rms_epsilon: float | None  # None if the norms subtract the mean. Another key has their epsilon.
    rope: RopeParameters
    expert_count: int
    expert_used_count: int
    expert_feed_forward_length: int
    vocabulary_size: int
    sliding_window: int | None  # Window size in tokens, with the token itself. None without a sliding window.

    @property
    def query_width(self) -> int:
        return self.head_count * self.key_length

    @property
    def head_count_kv(self) -> int:
        return max(self.head_counts_kv)

    @property
    def feed_forward_length(self) -> int:
        return max(self.feed_forward_lengths)
