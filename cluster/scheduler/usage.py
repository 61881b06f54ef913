from __future__ import annotations

from dataclasses import dataclass

from llamaclust.cluster.scheduler.requests import Timings, rate


@dataclass(slots=True)
class Usage:
    arrived_ns: int
    started_ns: int = 0
    first_ns: int = 0  # Time of the first sampled token, or of the first result if no token is sampled.
    last_ns: int = 0
    cached_tokens: int | None = None  # Prompt tokens found in the prefix cache when the sequence first started.

    def started(self, now_ns: int) -> None:
        self.started_ns = self.started_ns or now_ns

    def answered(self, now_ns: int) -> None:
        self.first_ns = self.first_ns or now_ns
        self.last_ns = now_ns

    def timings(self, prompt: int, generated: int, drafted: int, accepted: int, restored: int = 0) -> Timings:
        started = self.started_ns or self.arrived_ns
        first = self.first_ns or started
        cached = self.cached_tokens or 0
        return Timings(
            queue_ms=(started - self.arrived_ns) / 1e6,
            ttft_ms=(first - self.arrived_ns) / 1e6,
            prefill_tok_s=rate(prompt - cached, (first if generated else self.last_ns) - started),
            decode_tok_s=rate(generated - restored - 1, self.last_ns - first),
            prompt_tokens=prompt,
            cached_tokens=cached,
            generated_tokens=generated,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
        )
