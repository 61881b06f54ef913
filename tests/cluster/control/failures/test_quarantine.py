"""Tests which workers plans exclude, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llamaclust.cluster.control.cluster_state import PoolState
from llamaclust.cluster.control.failures import quarantine as quarantine_module
from llamaclust.cluster.control.failures.quarantine import Quarantine

NONE = frozenset[str]()


def failing(quarantine: Quarantine, name: str, now_s: float, *requests: int) -> Quarantine:
    return quarantine.failed(name, "a step failed", frozenset(requests), now_s)


def test_the_time_doubles_after_each_failure() -> None:
    quarantine, pauses, now_s = Quarantine(), [], 100.0
    for _ in range(12):
        quarantine = quarantine.exclude("b", "it does not load", now_s)
        assert quarantine.names(now_s) == {"b"}
        pauses.append(quarantine.records["b"].pause_s)
        now_s = quarantine.records["b"].end_s
    assert pauses == [10, 20, 40, 80, 160, 320, *[600] * 6]


def test_a_second_failure_excludes_whichever_requests_were_in_flight() -> None:
    for first, second in (((1, 2), (3,)), ((1,), (1,)), ((), ())):
        quarantine = failing(Quarantine(), "b", 0.0, *first)
        assert quarantine.names(0.0) == NONE and quarantine.next_end_s(0.0) is None
        quarantine = failing(quarantine, "b", 1.0, *second)
        assert quarantine.names(1.0) == {"b"} and quarantine.next_end_s(1.0) == 11.0
        assert quarantine.records["b"].text == "it failed 2 times, last: a step failed"


def test_one_failure_after_the_quarantine_begins_the_next_and_those_within_it_do_not_count() -> None:
    """A worker that no other one can replace serves in its quarantine, and may fail several times."""
    quarantine = failing(failing(Quarantine(), "b", 0.0, 1), "b", 1.0, 1)
    for now_s in (1.1, 2.0, 10.9):
        quarantine = failing(quarantine, "b", now_s, 2)
        assert quarantine.records["b"].end_s == 11.0 and quarantine.records["b"].failures == 2
    assert failing(quarantine, "b", 11.0, 2).records["b"].pause_s == 20.0


@pytest.mark.parametrize(
    ("within", "released"),
    [((7,), {7}), ((7, 8), {7}), ((8,), set()), ((), set())],
    ids=["the same", "with another", "another", "none"],
)
def test_a_failure_within_the_quarantine_says_why_and_which_requests_were_there(
    within: tuple[int, ...], released: set[int]
) -> None:
    quarantine = failing(failing(Quarantine(), "b", 0.0, 7, 9), "b", 1.0, 7)
    quarantine = quarantine.failed("b", "its rows are not finite", frozenset(within), 2.0)
    assert quarantine.records["b"].text == "it failed 2 times, last: its rows are not finite"
    for request in (7, 8, 9):
        assert (not quarantine.exonerate(frozenset({request})).records) == (request in released)


def test_records_of_workers_that_fail_no_more_are_not_kept_for_ever() -> None:
    quarantine = Quarantine()
    for number in range(5000):
        quarantine = failing(quarantine, f"worker-{number}", number / 100, 1)
        assert len(quarantine.records) <= quarantine_module._MOST_RECORDS
    assert [*quarantine.records][-3:] == ["worker-4997", "worker-4998", "worker-4999"]
    assert failing(quarantine, "worker-4500", 51.0, 2).names(51.0) == {"worker-4500"}
    assert [*failing(quarantine, "new", 700.0, 1).records] == ["new"]


def test_a_worker_that_no_other_one_can_replace_is_used_again_after_growing_pauses() -> None:
    quarantine = failing(failing(Quarantine(), "b", 0.0, 1), "b", 1.0, 1)
    assert quarantine.retry_at_s(["a", "b"]) == 0.0
    pauses = []
    for _ in range(6):
        quarantine = failing(quarantine, "b", 2.0, 1)
        pauses.append(quarantine.retry_at_s(["a", "b"]) - 2.0)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0] and quarantine.retry_at_s(["a"]) == 0.0


def test_pauses_grow_no_more_where_the_worker_was_used_for_longer_than_the_last_one() -> None:
    quarantine, now_s = failing(failing(Quarantine(), "b", 0.0, 1), "b", 1.0, 1), 2.0
    for served_s, pause_s in ((0.0, 0.25), (0.2, 0.5), (0.4, 1.0), (1.1, 0.25), (0.25, 0.5), (0.6, 0.25)):
        now_s += served_s
        quarantine = failing(quarantine, "b", now_s, 1)
        assert quarantine.retry_at_s(["b"]) - now_s == pytest.approx(pause_s)
        now_s = quarantine.retry_at_s(["b"])


def test_failures_are_forgotten_where_the_worker_serves_for_long_enough() -> None:
    once = failing(Quarantine(), "b", 0.0, 1)
    assert failing(once, "b", 600.0, 1).names(600.0) == {"b"}
    assert failing(once, "b", 601.0, 1).names(601.0) == NONE
    often, now_s = Quarantine(), 0.0
    for _ in range(8):
        often = failing(often, "b", now_s, 1)
        now_s = often.records["b"].end_s
    assert often.records["b"].pause_s == 600.0
    assert failing(often, "b", now_s + 6000.0, 1).names(now_s + 6000.0) == {"b"}
    assert failing(often, "b", now_s + 6001.0, 1).names(now_s + 6001.0) == NONE


def test_workers_are_released_that_failed_while_the_request_at_fault_was_in_flight_alone() -> None:
    quarantine = failing(failing(Quarantine(), "c", 0.0, 1, 7), "c", 1.0, 7, 8)
    quarantine = failing(failing(quarantine, "b", 2.0, 7), "b", 3.0, 7)
    quarantine = failing(failing(quarantine, "a", 4.0, 7), "a", 5.0, 8)
    assert quarantine.names(5.0) == {"a", "b", "c"}
    assert quarantine.exonerate(frozenset({7})).names(5.0) == {"a"}
    assert quarantine.exonerate(frozenset({1})).names(5.0) == {"a", "b", "c"}


def test_it_ends_by_itself_or_with_a_release() -> None:
    quarantine = Quarantine().exclude("a", "", 0.0).exclude("b", "", 5.0)
    assert quarantine.next_end_s(0.0) == 10.0 and quarantine.next_end_s(12.0) == 15.0
    assert quarantine.names(12.0) == {"b"} and quarantine.names(15.0) == frozenset()
    assert quarantine.next_end_s(15.0) is None
    released = quarantine.release(["b"])
    assert released.names(0.0) == {"a"}
    assert released.exclude("b", "", 20.0).records["b"].end_s == 30.0, "failures before the release do not count"


def test_those_that_failed_most_often_come_first() -> None:
    quarantine = Quarantine().exclude("a", "", 0.0).exclude("b", "", 0.0).exclude("c", "", 0.0)
    quarantine = quarantine.exclude("b", "", 10.0)
    assert quarantine.worst_first({"a", "b", "c"}) == ["b", "a", "c"]
    assert quarantine.release("b").worst_first({"a", "b", "c"}) == ["a", "c"], "b was released before the plan is made"


def test_requests_without_results_anywhere_are_no_evidence_for_a_growing_time() -> None:
    quarantine, now_s = Quarantine(), 0.0
    for pause_s in (60, 120, 240):
        quarantine = quarantine.failed("c", "not finite", frozenset({7}), now_s, is_repeated=True)
        assert quarantine.names(now_s) == {"c"}, "one failure that came twice"
        assert quarantine.release_by_request(8, now_s) == quarantine
        quarantine = quarantine.release_by_request(7, now_s)
        assert quarantine.names(now_s) == NONE and quarantine.ignores_rows(now_s + pause_s - 1)
        now_s += pause_s
        assert not quarantine.ignores_rows(now_s)


def test_rows_are_evidence_where_another_worker_is_left() -> None:
    pool = PoolState(present={"a": 1, "b": 2})
    assert pool.may_exclude_more(0.0)
    assert not replace(pool, quarantine=Quarantine().exclude("b", "", 0.0)).may_exclude_more(0.0)
    assert not replace(pool, drained=frozenset("b")).may_exclude_more(0.0)
    ignoring = Quarantine().exclude("b", "", 0.0).failed("c", "", frozenset({7}), 0.0).release_by_request(7, 0.0)
    assert not replace(pool, quarantine=ignoring.release(["b"])).may_exclude_more(0.0)
