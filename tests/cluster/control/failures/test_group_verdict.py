"""Tests which member of a group is at fault, for any reports in any order."""

from __future__ import annotations

from itertools import permutations

import pytest

from llamaclust.cluster.control.failures.group_verdict import judge
from llamaclust.wire.control.groups import GroupFault


def fault(worker: str, kind: str) -> GroupFault:
    return GroupFault(3, worker, kind, f"{worker} {kind}")


@pytest.mark.parametrize(
    ("reports", "guilty"),
    [
        ({"b": fault("b", "failed"), "a": fault("b", "closed"), "c": fault("a", "closed")}, "b"),
        ({"a": fault("c", "wrong"), "b": fault("a", "closed"), "c": fault("a", "closed")}, "c"),
        ({"a": fault("b", "late"), "c": fault("b", "late")}, "b"),
        ({"a": fault("b", "late"), "c": fault("a", "closed")}, "b"),
        ({"a": fault("b", "closed"), "c": fault("a", "closed")}, "b"),
        ({"a": fault("b", "closed")}, "b"),
        ({"a": fault("b", "wrong"), "b": fault("a", "wrong"), "c": fault("a", "wrong")}, "a"),
        ({"b": fault("c", "wrong"), "c": fault("b", "wrong"), "a": fault("b", "wrong"), "d": fault("b", "late")}, "b"),
        ({"a": fault("c", "late"), "b": fault("c", "late"), "c": fault("b", "late")}, "c"),
    ],
)
def test_the_member_at_fault(reports: dict[str, GroupFault], guilty: str) -> None:
    for order in permutations(reports.items()):
        verdict = judge(dict(order))
        assert verdict is not None and verdict.worker == guilty


def test_nobody_without_reports() -> None:
    assert judge({}) is None
