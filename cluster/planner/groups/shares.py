from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.groups.divided_costs import DividedCosts, DividedTables, Shares

_FEW = 100
"""Maximum sum of the small whole-number shares that are tried."""
MANY = 1000
_TOLERANCE = 1.003
"""Shares that take up to this factor times the shortest time are as good."""
_LEAST_DIVIDED = 1e-6
"""Minimum ratio of divided time to fixed time, because the divided time is a divisor."""


def balanced(
    parts: DividedCosts, seconds: DividedTables, lacking: DividedTables, *, allow_unrounded: bool = False
) -> Shares:
    """Returns shares with the shape [members, stages] that minimize the slowest member's time. A stage's shares sum to
    less than 1 if memory does not suffice. `lacking` holds missing bytes, or free bytes as negative numbers."""
    shares = _filled(seconds, lacking, parts.least_units, margin=0.0 if allow_unrounded else 0.5)
    if allow_unrounded or not parts.coarse:
        return shares
    given = parts.coarse_parts(shares)
    rest = _filled(seconds.with_coarse(given), lacking.with_coarse(given), parts.least_units)
    same = np.all(
        [(one == other).all(axis=0) for one, other in zip(given, parts.coarse_parts(rest), strict=True)], axis=0
    )
    return np.where(same, rest, shares)


def _filled(seconds: DividedTables, lacking: DividedTables, units: int, *, margin: float = 0.5) -> Shares:
    """Returns shares for which all members take equally long. Memory for a share of `margin` / `units` stays free."""
    fixed = seconds.whole
    each = np.maximum(seconds.divided, _LEAST_DIVIDED * np.abs(fixed) + 1e-12)
    short, more, least = lacking.whole, lacking.divided, 1 / units
    with np.errstate(divide="ignore", invalid="ignore"):
        rooms = np.nan_to_num(-short / more, nan=1.0, posinf=1.0, neginf=0.0)
    most = np.where(short > 0, 0.0, np.clip(rooms - margin * least, 0.0, 1.0))
    times = np.sort(np.concatenate([fixed + least * each, fixed + np.maximum(most, least) * each]), axis=0)
    sums = np.array([_taken(time, fixed, each, least, most).sum(axis=0) for time in times])
    after = np.minimum((sums < 1).sum(axis=0), len(times) - 1)  # The first sufficient time, or else the last time.
    before = np.maximum(after - 1, 0)
    (low, high), (low_sum, high_sum) = (
        np.take_along_axis(values, np.array([before, after]), 0) for values in (times, sums)
    )
    along = np.clip((1 - low_sum) / np.maximum(high_sum - low_sum, 1e-12), 0.0, 1.0)
    taken = _taken(low + along * (high - low), fixed, each, least, most)
    total = taken.sum(axis=0)
    return np.where(total >= 1 - 1e-9, taken / np.maximum(total, 1e-12), taken)


def _taken(limit: Table, fixed: Table, each: Table, least: float, most: Table) -> Shares:
    return np.minimum(np.maximum((limit - fixed) / each, least), most)


def as_integers(shares: Sequence[float], cost: Callable[[tuple[int, ...]], float]) -> tuple[tuple[int, ...], float]:
    """Returns shares as small whole numbers, and their cost. The cost is nearly the lowest, or inf if no shares fit."""
    near = (in_total(shares, total) for total in (*range(len(shares), _FEW + 1), MANY))
    costs = {found: cost(found) for found in dict.fromkeys(near)}
    limit = _TOLERANCE * min(costs.values())
    if limit == inf:
        return in_total(shares, MANY), inf
    return next((found, seconds) for found, seconds in costs.items() if seconds <= limit)


def in_total(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Rounds shares to whole numbers above 0. Their sum is `total`, or more if a small share was raised to 1."""
    wanted = np.array(shares) * total / sum(shares)
    found = np.floor(wanted).astype(int)
    for member in np.argsort(found - wanted, kind="stable")[: total - int(found.sum())]:
        found[member] += 1
    return tuple(int(max(count, 1)) for count in found)
