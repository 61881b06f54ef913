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
    """Settings of a scheduler for one pipeline. The stages must be loaded with limits that are at least as high."""

    model_id: str
    vocabulary: int
    context_length: int
    kv_blocks: int
    kv_type: KvType = KvType.F16
    # Maximum number of sequences that run at the same time. Each has at most one slice per microbatch.
    max_sequences: int = 32
    max_waiting: int = 256
    # Maximum number of rows in a microbatch. Limits the bytes of its hidden state on a link.
    max_batch_tokens: int = 512
    max_outputs: int = 64  # Maximum number of sampled and scored rows in a microbatch.
    max_embedded_rows: int = 512  # Maximum number of rows in a microbatch whose hidden states are returned.
    embedding_length: int = 0  # Channels of a hidden state. 0: no hidden states are returned.
    # Maximum number of prompt tokens in a microbatch. None: chosen by predicted time.
    prefill_chunk: int | None = None
    # Maximum predicted milliseconds for which a microbatch with prompt tokens keeps the slowest stage busy.
    prefill_ms: float = 100.0
    # The limit while no sequence decodes. It is higher, because larger chunks read the weights less often.
    prefill_alone_ms: float = 400.0
    prefix_cache: bool = True
    whole_prompts: bool = False  # True if each prompt must be computed in one microbatch, as encoders require.
    generates: bool = True  # False if the model only computes embeddings or scores.
    adapters: Mapping[int, str] = field(default_factory=dict)  # Digests of adapters, by the number that clients use.
    window: int | None = None  # Number of positions that layers with a sliding window see. None: no separate blocks.
    window_blocks: int = 0
    has_states: bool = False  # True if layers keep a state per sequence.
    state_blocks: int = 0  # Number of state blocks. 0: states are in KV blocks.
    image_width: int = 0  # Number of floats in an image row. 0: the model takes no images.
    max_image_bytes: int = MAX_GIVEN_BYTES  # Maximum bytes of image rows in a microbatch.
    rope_sections: int = 0  # Number of rope positions per row. 0: the rope position is the row's position.
    speculation: SpeculationSettings | None = None
    # Number of positions between states that are kept for other sequences.
    state_span: int = KV_BLOCK_TOKENS

    def __post_init__(self) -> None:
        assert self.max_sequences < self.max_batch_tokens, "max_sequences decode rows must leave room for a prefill row"
        assert self.max_sequences <= self.max_outputs, "each of max_sequences decode rows needs an output row"
        assert self.kv_blocks >= 1
        assert not (self.whole_prompts and self.prefix_cache), (
            "an encoder has no prefix cache, because its keys and values depend on later tokens"
        )
        assert self.state_blocks != 1, "a sequence needs two state blocks: one to read and one to write"
        assert self.state_span % KV_BLOCK_TOKENS == 0, self.state_span
        group = self.window_group
        assert group is None or self.window_blocks >= group.sequence_blocks + group.row_blocks, self.window_blocks

    @property
    def window_group(self) -> WindowGroup | None:
        return None if self.window is None else WindowGroup(self.window, self.max_batch_tokens)

    @property
    def max_drafted(self) -> int:
        """Maximum number of drafted tokens in a step. It is 0 if there are recurrent states, but no `state_blocks`."""
        if self.speculation is None or (self.has_states and not self.state_blocks):
            return 0
        group = self.window_group
        return min(self.speculation.max_window, group.drafted_rows if group is not None else MAX_WINDOW)

    @property
    def has_mtp(self) -> bool:
        return self.speculation is not None and self.speculation.mtp and self.max_drafted > 0

    @property
    def may_repeat_rows(self) -> bool:
        """True if the last row can be computed again in place, without resetting states or window blocks."""
        return self.window is None and not self.has_states

    @property
    def max_group_rows(self) -> int:
        return self.max_batch_tokens - self.max_sequences

    @property
    def max_sequence_tokens(self) -> int:
        """Maximum tokens in prompt and answer. If `whole_prompts` is set, a prompt must fit into one microbatch."""
        tokens = min(self.context_length, self.kv_blocks * KV_BLOCK_TOKENS)
        return min(tokens, self.max_batch_tokens, self.max_embedded_rows) if self.whole_prompts else tokens


@dataclass(frozen=True, slots=True)
class EngineSettings:
    request_s: float = 600.0  # Seconds from a request's arrival to its last token.
    result_s: float = 300.0  # Seconds from a microbatch's start to its result.
    watch_s: float = 1.0  # Seconds between two checks of the result's deadline.
    # Seconds from the start of a move until sequences on the old pipeline are computed again on the new one.
    retirement_s: float = 60.0
