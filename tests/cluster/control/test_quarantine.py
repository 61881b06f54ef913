"""Which workers plans exclude, and for how long."""

from __future__ import annotations

from llamaclust.cluster.control.quarantine import Quarantine


def test_the_time_doubles_after_each_failure() -> None:
    quarantine, pauses = Quarantine(), []
    for _ in range(12):
        quarantine = quarantine.add("b", 100.0)
        assert quarantine.names(100.0) == {"b"}
        pauses.append(quarantine.terms["b"][1] - 100.0)
    assert pauses == [10, 20, 40, 80, 160, 320, *[600] * 6]


def test_it_ends_by_itself_or_with_a_release() -> None:
    quarantine = Quarantine().add("a", 0.0).add("b", 5.0)
    assert quarantine.next_end_s(0.0) == 10.0 and quarantine.next_end_s(12.0) == 15.0
    assert quarantine.names(12.0) == {"b"} and quarantine.names(15.0) == frozenset()
    assert quarantine.next_end_s(15.0) is None
    released = quarantine.release(["b"])
    assert released.names(0.0) == {"a"}
    assert released.add("b", 20.0).terms["b"][1] == 30.0, "failures before the release do not count"
