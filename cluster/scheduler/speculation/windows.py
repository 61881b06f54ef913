"""Chooses the number of drafted tokens for each sequence, so that the most tokens per second are expected.

A row at depth d in its draft adds a ** d tokens on average, where a is the acceptance rate. Rows are added in order of
this gain, as long as the expected speed grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heapreplace
from math import inf
from typing import Protocol

from llamaclust.cluster.scheduler.speculation.candidates import Candidate, Chain
from llamaclust.cluster.scheduler.speculation.costs import counts_to_try

_MARGIN = 0.05
"""Minimum relative gain for which tokens are drafted."""
_DEEPEST = 6
_MARGIN_BESIDE = 0.2
"""Minimum relative gain if several microbatches are in flight."""


class RoundTimes(Protocol):
    """Times of rounds in nanoseconds. A round is one decode step of all sequences. The scheduler measures these times,
    and the planner predicts them."""

    def plain_ns(self, sequences: int, groups: int) -> float:
        """Returns the time of a round without drafts, or infinity if it is unknown. Without drafts, a step may be
        submitted before its input token is known (lookahead)."""

    def window_ns(self, rows: int, groups: int) -> float:
        """Returns the time of a round with `rows` rows, including rows of drafted tokens."""

    def slowest_ns(self, rows: int) -> float: ...


def best_chain(rate: float, length: int, times: RoundTimes, most: int) -> Chain | None:
    """Returns the fastest chain of windows for a draft of `length` tokens with the acceptance rate `rate`. Returns None
    if times are unknown, or if windows cannot overlap."""
    rate = min(rate, 0.999)
    best: Chain | None = None
    for count in counts_to_try(min(most, length)):
        round_ns, stage_ns = times.window_ns(1 + count, 1), times.slowest_ns(1 + count)
        if round_ns == inf:
            return None
        depth = min(_DEEPEST, int(round_ns / max(stage_ns, 1.0)))
        windows = length // count
        if depth < 2 or windows < 2:
            continue
        whole = rate**count
        # Counting the delay by windows after a wrong token made answers slower (benchmarks/notebook.md).
        followed = whole * (1 - whole ** (windows - 1)) / (1 - whole)
        ns = round_ns + max(stage_ns, round_ns / depth) * followed
        speed = (1 - rate ** (count * windows + 1)) / (1 - rate) / ns
        if best is None or speed > best.speed:
            best = Chain(count, depth, rate, speed)
    return best if best is None else replace(best, speed=best.speed / (1 + _MARGIN))


def best_windows(candidates: Sequence[Candidate], times: RoundTimes, groups: int, most_rows: int) -> list[int]:
    """Returns the number of tokens to draft for each sequence of a microbatch, at most `most_rows` in total."""
    sequences = len(candidates)
    windows = [0] * sequences
    plain_ns = times.plain_ns(sequences, groups)
    limit = sum(each.most_gain for each in candidates)
    margin = _MARGIN if groups == 1 else _MARGIN_BESIDE
    if most_rows < 1 or plain_ns == inf or limit < margin * sequences:
        return windows
    gains = _greatest(candidates, most_rows)
    best, best_speed = 0, (1 + margin) * sequences / plain_ns
    chosen, tokens = 0, float(sequences)
    for count in counts_to_try(len(gains)):
        tokens += sum(gain for gain, _ in gains[chosen:count])
        chosen = count
        speed = tokens / times.window_ns(sequences + count, groups)
        if speed > best_speed:
            best, best_speed = count, speed
    for _, index in gains[:best]:
        windows[index] += 1
    return windows


def _greatest(candidates: Sequence[Candidate], most: int) -> list[tuple[float, int]]:
    next_rows = [(-each.gain(1), index, 1) for index, each in enumerate(candidates) if each.tokens]
    heapify(next_rows)
    gains: list[tuple[float, int]] = []
    while next_rows and len(gains) < most:
        gain, index, depth = next_rows[0]
        gains.append((-gain, index))
        if depth < len(candidates[index].tokens):
            heapreplace(next_rows, (-candidates[index].gain(depth + 1), index, depth + 1))
        else:
            heappop(next_rows)
    return gains


def speed_of(candidates: Sequence[Candidate], windows: Sequence[int], times: RoundTimes, groups: int) -> float:
    drafted = sum(windows)
    if not drafted:
        return len(candidates) / times.plain_ns(len(candidates), groups)
    gains = (
        each.gain(depth) for each, window in zip(candidates, windows, strict=True) for depth in range(1, window + 1)
    )
    return (len(candidates) + sum(gains)) / times.window_ns(len(candidates) + drafted, groups)
