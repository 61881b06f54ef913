"""The context length of a plan: its bounds, the choice between them, and the reasons in words."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sizes import mib

_STEPS = 4
"""Number of context lengths, from one power of two to the next, among which a plan chooses."""
_ANSWER_TOKENS = 1024
"""Room for an answer in the context length that an error message advises. The length is a multiple of this number."""


class ContextBound(StrEnum):
    """The reason why a plan chooses no longer context, even with unlimited memory."""

    KEY = "context_length"
    MODEL = "model"
    ROPE = "rope_factors"
    ENCODER = "encoder"
    KV_DISK = "kv_disk"


_CHOOSERS = {
    ContextBound.MODEL: "the model file",
    ContextBound.ROPE: "the model file",
    ContextBound.ENCODER: "the model, which computes a prompt in one batch",
    ContextBound.KV_DISK: "`kv_disk`, which keeps a sliding window only up to this length",
}
_WHY = {
    ContextBound.KEY: "`context_length` sets it",
    ContextBound.MODEL: "a context has at most this many tokens",
    ContextBound.ROPE: "a longer one takes the file's factors for long contexts, which changes answers",
    ContextBound.ENCODER: "the model computes a prompt in one batch",
    ContextBound.KV_DISK: "with a longer one, `kv_disk` cannot keep the layers with a sliding window",
}


@dataclass(frozen=True, slots=True)
class ContextBounds:
    """The context lengths among which a plan chooses by memory. There is no choice if `least` equals `most`."""

    least: int
    most: int
    trained: int  # Context length of the model.
    bound: ContextBound = ContextBound.MODEL
    longest_key: int = MAX_CONTEXT_TOKENS  # Largest value of `context_length`.

    @classmethod
    def fixed(cls, tokens: int) -> Self:
        return cls(tokens, tokens, tokens)

    def longest(self, fits: Callable[[int], bool]) -> int:
        """Returns the longest length that fits, or `least`. Lengths above one that does not fit must not fit."""
        if self.least == self.most or fits(self.most):
            return self.most
        lengths = [*self._lengths()]
        return lengths[max(0, bisect_left(lengths, True, key=lambda length: not fits(length)) - 1)]

    def _lengths(self) -> Iterator[int]:
        octave = self.least
        while octave < self.most:
            lengths = (octave + octave * step // _STEPS for step in range(_STEPS))
            yield from (length for length in lengths if length < self.most)
            octave *= 2


@dataclass(frozen=True, slots=True)
class ContextChoice:
    tokens: int
    bounds: ContextBounds
    missing_bytes: int = 0  # Bytes of memory that a plan with the longest context would need in addition.

    @property
    def text(self) -> str:
        return f"{self.tokens} tokens ({self._why})"

    @property
    def _why(self) -> str:
        tokens, bounds = self.tokens, self.bounds
        if tokens == bounds.trained:
            return "the model's own context length"
        if bounds.bound is ContextBound.KEY:
            return f"{_WHY[bounds.bound]}; the model's own is {bounds.trained}"
        if tokens == bounds.most:
            why = f"the model's own is {bounds.trained}; {_WHY[bounds.bound]}"
        elif self.missing_bytes:
            own = "the model's own " if bounds.most == bounds.trained else ""
            needed = f"{own}{bounds.most} would need {mib(self.missing_bytes)} MiB more"
            why = f"{needed}, as it is to leave half of the memory beside the weights free"
        else:
            why = f"the model's own is {bounds.trained}; memory allowed no more at the start"
        return f"{why}; `context_length` changes it"

    def advice(self, prompt_tokens: int) -> str:
        """Says what can be done about a prompt with this many tokens, which is too long for the context."""
        trained, longest = self.bounds.trained, min(self.bounds.trained, self.bounds.longest_key)
        limit = "the model allows" if longest == trained else "`context_length` allows"
        if self.tokens >= longest:
            return f"{limit} no more; shorten it"
        if prompt_tokens >= longest:
            return f"{limit} no more than {longest}; shorten it"
        wanted = min(longest, (-(-prompt_tokens // _ANSWER_TOKENS) + 1) * _ANSWER_TOKENS)
        return f"shorten it, or set `context_length` to {wanted} or more ({self._origin}; {limit} {longest})"

    @property
    def _origin(self) -> str:
        if self.bounds.bound is ContextBound.KEY:
            return f"it is set to {self.tokens}"
        chooser = "memory" if self.tokens < self.bounds.most else _CHOOSERS[self.bounds.bound]
        return f"the default of {self.tokens} is due to {chooser}"
