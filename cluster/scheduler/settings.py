from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.kv.groups import WindowGroup
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.limits import MAX_GIVEN_BYTES
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """A scheduler's settings for one pipeline. The stages must be loaded with limits that are at least as high."""

    model_id: str
    vocabulary: int
    context_length: int
    kv_blocks: int
    kv_type: KvType = KvType.F16
    max_sequences: int = 32  # running together; each is in a microbatch at most once
    max_waiting: int = 256
    max_batch_tokens: int = 512  # of one microbatch; bounds the bytes of its hidden state on a link
    max_outputs: int = 64  # sampled and scored rows of one microbatch
    max_embedded_rows: int = 512  # rows of one microbatch whose hidden state comes back
    embedding_length: int = 0  # channels of a hidden state; 0: none come back
    prefill_chunk: int | None = None  # prompt tokens of one microbatch, at most; None: by predicted time
    prefill_ms: float = 100.0  # predicted time of a microbatch with prefill on the slowest stage, at most
    prefill_alone_ms: float = 400.0  # predicted time without decode: larger chunks read the weights less often
    prefix_cache: bool = True
    whole_prompts: bool = False  # a prompt is computed in one microbatch, as encoders need it
    generates: bool = True  # False: requests are for embeddings or scores alone
    adapters: Mapping[int, str] = field(default_factory=dict)  # digests by number, as clients load them
    window: int | None = None  # positions that layers with blocks of their own see
    window_blocks: int = 0  # blocks of layers with a window
    has_states: bool = False  # layers keep a state of each sequence
    state_blocks: int = 0  # blocks of states; 0: states are in KV blocks
    image_width: int = 0  # floats of an image's row; 0: the model takes no images
    max_image_bytes: int = MAX_GIVEN_BYTES  # of rows of images in one microbatch
    rope_sections: int = 0  # rope positions of a row; 0: one, its position
    speculation: SpeculationSettings | None = None  # None: no tokens are drafted
    state_span: int = KV_BLOCK_TOKENS  # positions from one state that is kept for other sequences to the next

    def __post_init__(self) -> None:
        assert self.max_sequences < self.max_batch_tokens, "all that decode together must leave room for a prefill row"
        assert self.max_sequences <= self.max_outputs, "all that decode together must have an output row"
        assert self.kv_blocks >= 1
        assert not (self.whole_prompts and self.prefix_cache), "what an encoder stores depends on later tokens"
        assert self.state_blocks != 1, "a sequence that reads one needs another to write"
        assert self.state_span % KV_BLOCK_TOKENS == 0, self.state_span
        group = self.window_group
        assert group is None or self.window_blocks >= group.sequence_blocks + group.row_blocks, self.window_blocks

    @property
    def window_group(self) -> WindowGroup | None:
        return None if self.window is None else WindowGroup(self.window, self.max_batch_tokens)

    @property
    def max_drafted(self) -> int:
        """The most tokens drafted in a step. It is 0 if layers have states, but no state blocks to return to."""
        if self.speculation is None or (self.has_states and not self.state_blocks):
            return 0
        group = self.window_group
        return min(self.speculation.max_window, group.drafted_rows if group is not None else MAX_WINDOW)

    @property
    def has_mtp(self) -> bool:
        return self.speculation is not None and self.speculation.mtp and self.max_drafted > 0

    @property
    def may_repeat_rows(self) -> bool:
        """True if the last row may be computed again in place, because it changes no state and no block is released."""
        return self.window is None and not self.has_states

    @property
    def max_group_rows(self) -> int:
        """The most rows that a microbatch can compute together while all other sequences decode."""
        return self.max_batch_tokens - self.max_sequences

    @property
    def max_sequence_tokens(self) -> int:
        """The most tokens of prompt and answer. If prompts are computed as a whole, each must fit into a microbatch."""
        tokens = min(self.context_length, self.kv_blocks * KV_BLOCK_TOKENS)
        return min(tokens, self.max_batch_tokens, self.max_embedded_rows) if self.whole_prompts else tokens


@dataclass(frozen=True, slots=True)
class EngineSettings:
    request_s: float = 600.0  # from a request's arrival to its last token
    result_s: float = 300.0  # from a microbatch's start to its result
    watch_s: float = 1.0  # between two looks at the result's deadline
    retirement_s: float = 60.0  # from a move until the old pipeline's sequences are computed again on the new one
