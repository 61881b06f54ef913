"""The state of an answer's samplers, which can be restored from the answer's rows."""

from __future__ import annotations

from llamaclust.cluster.scheduler.breakers import SeenBreakers
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampling import RowResult


class SamplingState:
    __slots__ = ("breakers", "is_plain", "mu", "stop_ids", "window")

    def __init__(self, request: GenerationRequest) -> None:
        params = request.params
        uses_tokens = params.needs_history or params.chain is not None or bool(request.breakers)
        self.is_plain = not (uses_tokens or request.needs_matcher)
        self.window = request.history_window
        self.stop_ids = tuple(sorted(request.stop_token_ids))
        self.breakers = SeenBreakers(request.breakers, request.prompt)  # for DRY
        self.mu = 0.0 if params.chain is None else params.chain.first_mu

    def add(self, row: RowResult) -> None:
        self.breakers.add(row.token)
        self.mu = self.mu if row.mu is None else row.mu
