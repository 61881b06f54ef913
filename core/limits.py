"""Limits of the whole program: the version of the arithmetic, maximum sizes, and the limits of one stage's buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import Choice, Integer
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS

NUMERICS_VERSION = 6
"""Version of the rules in docs/internals/numerics.md. The handshake refuses workers with another version."""

MAX_WORKERS = 256
MAX_SEQUENCES = 1024
MAX_BATCH_TOKENS = 8192
MAX_TOP_LOGPROBS = 128
MAX_EMBEDDING_BYTES = 1 << 24  # Maximum size of hidden states in one result.
MAX_GIVEN_BYTES = 3 << 23  # Maximum size of image rows in one microbatch.
MAX_TILE_PIXELS = 1 << 23  # Maximum size of a tile. An image encoder computes one tile at a time.
MAX_TILE_PATCHES = 1 << 14
MAX_BODY_BYTES = 1 << 24  # Maximum size of an HTTP request's body.
MAX_KV_BLOCKS = 1 << 26
MAX_EXPERT_SHARDS = 64  # Maximum number of shards of one layer.
MAX_GROUP_MEMBERS = 16  # Maximum number of workers that compute a stage together.
MAX_SHARE = 10_000  # Maximum of a number in a group's shares, such as 2:1.
GROUP_ID_BYTES = 16
MAX_ADAPTERS = 16  # Maximum number of LoRA adapters of a model.
MAX_ADAPTER_RANK = 1024
MAX_ADAPTER_SCALE = 1000.0  # Maximum absolute value of an adapter's scale.

AdapterScales = tuple[tuple[int, float], ...]
"""Pairs (adapter number, scale) of a sequence's LoRA adapters, in ascending order of number. No scale is 0."""

KV_TYPES = ("f16", "q8_0", "int8")
"""The names in `model.kv_type.KvType`. They are repeated here because `core` must not import `model`."""


def max_embedded_rows(width: int) -> int:
    return MAX_EMBEDDING_BYTES // (4 * width)


@dataclass(frozen=True, slots=True)
class StageLimits:
    """The limits for which a loaded stage has allocated its buffers. The stage asserts that no limit is exceeded."""

    max_batch_tokens: Annotated[int, Integer(1, MAX_BATCH_TOKENS)]
    max_outputs: Annotated[int, Integer(1, MAX_BATCH_TOKENS)]
    max_sequences: Annotated[int, Integer(1, MAX_SEQUENCES)]
    max_context_tokens: Annotated[int, Integer(1, MAX_CONTEXT_TOKENS)]
    kv_blocks: Annotated[int, Integer(1, MAX_KV_BLOCKS)]
    kv_type: Annotated[str, Choice(KV_TYPES)] = "f16"
    # Number of separate KV blocks for sliding-window layers, which then free the blocks outside the window. 0 means
    # that these layers use ordinary KV blocks.
    window_blocks: Annotated[int, Integer(0, MAX_KV_BLOCKS)] = 0
    # State blocks of sequences. 0 means that each KV block holds the state after its last computed position.
    state_blocks: Annotated[int, Integer(0, MAX_KV_BLOCKS)] = 0
    # Number of shards into which each layer's experts are divided. Stages' start and end count shards.
    expert_shards: Annotated[int, Integer(1, MAX_EXPERT_SHARDS)] = 1
    nextn: bool = False  # The last stage also has the model's head for multi-token prediction (MTP).
    wide_tiles: bool = False  # Weights of some quant types are stored in larger tiles, which are faster to decode.

    def places(self, start: int, end: int) -> tuple[float, float]:
        return shard_position(start, self.expert_shards), shard_position(end, self.expert_shards)

    def gives_up(self, window: int | None) -> bool:
        """True if layers with this window have their own KV blocks. These layers free the blocks outside the window."""
        return window is not None and self.window_blocks > 0

    def layer_blocks(self, window: int | None) -> int:
        return self.window_blocks if self.gives_up(window) else self.kv_blocks


def shard_position(part: int, expert_shards: int) -> int | float:
    """Returns where expert shard `part` begins, in layers. With 2 shards per layer, part 9 begins at layer 4.5."""
    return part // expert_shards if part % expert_shards == 0 else part / expert_shards


def layer_span(start: int, end: int, expert_shards: int) -> str:
    return f"[{shard_position(start, expert_shards)}, {shard_position(end, expert_shards)})"
