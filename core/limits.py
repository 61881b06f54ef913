"""Limits for the whole program: the arithmetic's version, sizes of batches and contexts, and a stage's capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import Choice, Integer
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS

NUMERICS_VERSION = 6
"""The version of the rules in docs/internals/numerics.md. The handshake refuses workers with another version."""

MAX_SEQUENCES = 1024
MAX_BATCH_TOKENS = 8192
MAX_TOP_LOGPROBS = 128
MAX_EMBEDDING_BYTES = 1 << 24  # of hidden states in the result of one microbatch
MAX_GIVEN_BYTES = 3 << 23  # of rows of images in one microbatch
MAX_TILE_PIXELS = 1 << 23  # of a tile, which an encoder of images takes at once
MAX_TILE_PATCHES = 1 << 14
MAX_BODY_BYTES = 1 << 24  # of a request to the API
MAX_KV_BLOCKS = 1 << 26
MAX_EXPERT_SHARDS = 64  # of a layer
MAX_GROUP_MEMBERS = 16  # workers that hold a stage together
MAX_SHARE = 10_000  # of a member of a group, relative to the others
GROUP_ID_BYTES = 16
MAX_ADAPTERS = 16  # of LoRA, of a model
MAX_ADAPTER_RANK = 1024
MAX_ADAPTER_SCALE = 1000.0  # positive or negative

AdapterScales = tuple[tuple[int, float], ...]
"""Pairs (adapter number, scale) for a sequence's LoRA adapters, in ascending order of number. No scale is 0."""

KV_TYPES = ("f16", "q8_0", "int8")
"""The names in `model.kv_type.KvType`, repeated because `core` must not import `model`."""


def max_embedded_rows(width: int) -> int:
    return MAX_EMBEDDING_BYTES // (4 * width)


@dataclass(frozen=True, slots=True)
class StageLimits:
    """Bounds of a stage's buffers, fixed when the stage is loaded. A `run` that exceeds one fails an assertion."""

    max_batch_tokens: Annotated[int, Integer(1, MAX_BATCH_TOKENS)]
    max_outputs: Annotated[int, Integer(1, MAX_BATCH_TOKENS)]
    max_sequences: Annotated[int, Integer(1, MAX_SEQUENCES)]
    max_context_tokens: Annotated[int, Integer(1, MAX_CONTEXT_TOKENS)]
    kv_blocks: Annotated[int, Integer(1, MAX_KV_BLOCKS)]
    kv_type: Annotated[str, Choice(KV_TYPES)] = "f16"
    # of layers with a window, which then keep no more than that; 0: they are as all others
    window_blocks: Annotated[int, Integer(0, MAX_KV_BLOCKS)] = 0
    # of states of sequences; 0: each KV block has a copy of the state behind the last of its positions computed
    state_blocks: Annotated[int, Integer(0, MAX_KV_BLOCKS)] = 0
    # start and end of stages count parts of layers, so many for each: the experts of a layer are on several workers
    expert_shards: Annotated[int, Integer(1, MAX_EXPERT_SHARDS)] = 1
    nextn: bool = False  # the last stage also holds the model's head for multi-token prediction (MTP)
    wide_tiles: bool = False  # weights of some types lie in tiles of another, which are larger and quicker to decode

    def places(self, start: int, end: int) -> tuple[float, float]:
        return layer_place(start, self.expert_shards), layer_place(end, self.expert_shards)

    def gives_up(self, window: int | None) -> bool:
        """True if layers with this window free KV blocks that have left the window. Such layers have own blocks."""
        return window is not None and self.window_blocks > 0

    def layer_blocks(self, window: int | None) -> int:
        return self.window_blocks if self.gives_up(window) else self.kv_blocks


def layer_place(part: int, expert_shards: int) -> int | float:
    """Returns the layer at which a part starts. For example, 4.5 is the middle of layer 4's experts. The result is
    exact if `expert_shards` is a power of two."""
    return part // expert_shards if part % expert_shards == 0 else part / expert_shards


def layer_span(start: int, end: int, expert_shards: int) -> str:
    return f"[{layer_place(start, expert_shards)}, {layer_place(end, expert_shards)})"
