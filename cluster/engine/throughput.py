"""Measures a cluster's recent speed in the same figures that a plan predicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.cluster.scheduler.speculation.counts import DraftCounts

_WINDOW_S = 10
_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """Medians over the last requests (None before the first request), and token counts over the last 10 seconds."""

    token_ms: float | None  # Time from one token to the next of the same request, including delays by other requests.
    ttft_ms: float | None  # Time from a request's arrival to its first token.
    prompt_tokens: int | None  # Number of computed prompt tokens of the request that has the median `ttft_ms`.
    tokens_per_s: float  # Tokens of all requests together.
    requests: int  # Number of requests that the medians are taken from.
    drafted_tokens: int  # Number of drafted tokens that were computed in the last ten seconds.
    accepted_tokens: int  # Number of the drafted tokens that became part of answers.
    drafts: Mapping[str, Mapping[str, int]]  # Drafted and accepted tokens since the start, by kind of draft.


class RecentSums:
    def __init__(self) -> None:
        # For each second, its number and the sums of the two values that `add` received in it.
        self._seconds: deque[tuple[int, int, int]] = deque(maxlen=_WINDOW_S + 1)

    def add(self, now_ns: int, one: int, other: int) -> None:
        second = now_ns // 1_000_000_000
        if self._seconds and self._seconds[-1][0] == second:
            _, old_one, old_other = self._seconds.pop()
            one, other = one + old_one, other + old_other
        self._seconds.append((second, one, other))

    def sums(self, now_ns: int) -> tuple[int, int]:
        first = _first_second(now_ns)
        recent = [(one, other) for second, one, other in self._seconds if second >= first]
        return sum(one for one, _ in recent), sum(other for _, other in recent)

    def rates(self, now_ns: int, since_ns: int) -> tuple[float, float]:
        """Returns (busy fraction, tokens per second) of the last 10 s. `add` must have received busy ns and tokens."""
        ns, rows = self.sums(now_ns)
        span_s = max((now_ns - max(_first_second(now_ns) * 1_000_000_000, since_ns)) / 1e9, 1e-3)
        return min(1.0, ns / 1e9 / span_s), rows / span_s


def _first_second(now_ns: int) -> int:
    return now_ns // 1_000_000_000 - _WINDOW_S + 1


class SpeedMeter:
    def __init__(self, since_ns: int) -> None:
        self._since_ns = since_ns
        self._sampled = RecentSums()
        self._drafted = RecentSums()
        self._drafts = DraftCounts()
        self._first_tokens: deque[tuple[float, int]] = deque(
            maxlen=_REQUESTS
        )  # Time to first token in ms, and number of computed prompt tokens.
        self._token_ms: deque[float] = deque(maxlen=_REQUESTS)

    def sampled(self, tokens: int, now_ns: int) -> None:
        self._sampled.add(now_ns, 0, tokens)

    def drafted(self, drafts: DraftCounts, now_ns: int) -> None:
        self._drafted.add(now_ns, drafts.drafted, drafts.accepted)
        self._drafts += drafts

    def finished(self, timings: Timings) -> None:
        if timings.generated_tokens:
            self._first_tokens.append((timings.ttft_ms, timings.prompt_tokens - timings.cached_tokens))
        if timings.decode_tok_s > 0:
            self._token_ms.append(1e3 / timings.decode_tok_s)

    def measured(self, now_ns: int) -> MeasuredSpeed:
        firsts = sorted(self._first_tokens)
        ttft_ms, prompt_tokens = firsts[(len(firsts) - 1) // 2] if firsts else (None, None)
        drafted, accepted = self._drafted.sums(now_ns)
        return MeasuredSpeed(
            token_ms=median(self._token_ms) if self._token_ms else None,
            ttft_ms=ttft_ms,
            prompt_tokens=prompt_tokens,
            tokens_per_s=self._sampled.rates(now_ns, self._since_ns)[1],
            requests=len(firsts),
            drafted_tokens=drafted,
            accepted_tokens=accepted,
            drafts={
                kind: {"drafted_tokens": drafted, "accepted_tokens": accepted}
                for kind, (drafted, accepted) in sorted(self._drafts.kinds.items())
            },
        )
