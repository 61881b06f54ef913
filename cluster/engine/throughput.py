"""A cluster's recent speed, in the figures that a plan predicts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from llamaclust.cluster.scheduler.requests import Timings

_WINDOW_S = 10
_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """Medians over the last requests, None before the first; tokens sampled over the last ten seconds."""

    token_ms: float | None  # from token to token of a request, whatever else ran
    ttft_ms: float | None  # from arrival to the first token
    prompt_tokens: int | None  # that the request of this median computed before it; others were in the prefix cache
    tokens_per_s: float  # of all requests together
    requests: int  # that count here


class RecentSums:
    """Sums over the last seconds."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int, int]] = deque(maxlen=_WINDOW_S + 1)  # (second, ns, rows)

    def add(self, now_ns: int, ns: int, rows: int) -> None:
        second = now_ns // 1_000_000_000
        if self._seconds and self._seconds[-1][0] == second:
            _, old_ns, old_rows = self._seconds.pop()
            ns, rows = ns + old_ns, rows + old_rows
        self._seconds.append((second, ns, rows))

    def rates(self, now_ns: int, since_ns: int) -> tuple[float, float]:
        """(share of time, rows per second) over the window, or since the start where that is less."""
        first = now_ns // 1_000_000_000 - _WINDOW_S + 1
        recent = [(ns, rows) for second, ns, rows in self._seconds if second >= first]
        span_s = max((now_ns - max(first * 1_000_000_000, since_ns)) / 1e9, 1e-3)
        return min(1.0, sum(ns for ns, _ in recent) / 1e9 / span_s), sum(rows for _, rows in recent) / span_s


class SpeedMeter:
    """Of one engine. `now_ns` values come from one monotonic clock."""

    def __init__(self, since_ns: int) -> None:
        self._since_ns = since_ns
        self._sampled = RecentSums()
        self._first_tokens: deque[tuple[float, int]] = deque(maxlen=_REQUESTS)  # (ms, prompt tokens)
        self._token_ms: deque[float] = deque(maxlen=_REQUESTS)

    def sampled(self, tokens: int, now_ns: int) -> None:
        self._sampled.add(now_ns, 0, tokens)

    def finished(self, timings: Timings) -> None:
        if timings.generated_tokens:
            self._first_tokens.append((timings.ttft_ms, timings.prompt_tokens - timings.cached_tokens))
        if timings.decode_tok_s > 0:
            self._token_ms.append(1e3 / timings.decode_tok_s)

    def measured(self, now_ns: int) -> MeasuredSpeed:
        firsts = sorted(self._first_tokens)
        ttft_ms, prompt_tokens = firsts[(len(firsts) - 1) // 2] if firsts else (None, None)
        return MeasuredSpeed(
            token_ms=median(self._token_ms) if self._token_ms else None,
            ttft_ms=ttft_ms,
            prompt_tokens=prompt_tokens,
            tokens_per_s=self._sampled.rates(now_ns, self._since_ns)[1],
            requests=len(firsts),
        )
