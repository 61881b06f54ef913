"""State of the samplers of one answer. The state can be restored from the answer's rows."""

from __future__ import annotations

from array import array

from llamaclust.cluster.scheduler.dry_breakers import SeenBreakers
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampler.results import RowResult


class SamplingState:
    __slots__ = ("_seen", "breakers", "delayed_ids", "is_plain", "mu", "window")

    def __init__(self, request: GenerationRequest) -> None:
        params = request.params
        uses_tokens = params.needs_history or params.chain is not None or bool(request.breakers)
        self.is_plain = not (uses_tokens or request.needs_matcher)
        self.window = request.history_window
        self._seen = _text_of(request) if self.window else array("i")
        self.delayed_ids = request.delayed_ids
        self.breakers = SeenBreakers(request.breakers, request.prompt)
        self.mu = 0.0 if params.chain is None else params.chain.first_mu

    def history(self, count: int, newer: int = 0) -> array[int]:
        """Returns up to `count` recent tokens. Leaves out image rows and the `newer` most recent tokens."""
        end = len(self._seen) - newer
        return self._seen[max(0, end - count) : end]

    def add(self, row: RowResult) -> None:
        if self.window:
            self._seen.append(row.token)
        self.breakers.add(row.token)
        self.mu = self.mu if row.mu is None else row.mu


def _text_of(request: GenerationRequest) -> array[int]:
    tokens, start = array("i"), 0
    for span in request.images:
        tokens.extend(request.prompt[start : span.start])
        start = span.end
    tokens.extend(request.prompt[start:])
    return tokens
