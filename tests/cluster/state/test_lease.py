"""Tests of a Lease as a lock: one holder at a time, despite clocks, conflicts and a silent API server."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.sections import Lease
from llamaclust.cluster.server import leadership
from llamaclust.cluster.state import lease as lease_module
from llamaclust.cluster.state.lease import LeaseLock, held
from llamaclust.core.errors import LlamaclustError, SupersededError
from support.clusters.command_line import eventually
from support.kubernetes.lease_api import LeaseApi, lease_api, lease_values


@pytest.fixture
def api() -> Iterator[LeaseApi]:
    with lease_api() as server:
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lease_module, "boot_s", made)
    return made


class Clock:
    """The clock of this machine."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Locks:
    """Makes locks of several processes on one lease."""

    def __init__(self, api: LeaseApi, folder: Path) -> None:
        self.settings = Lease.model_validate(lease_values(api, folder, "15s"))

    def __call__(self) -> LeaseLock:
        return LeaseLock(self.settings)


@pytest.fixture
def locks(api: LeaseApi, tmp_path: Path) -> Locks:
    return Locks(api, tmp_path)


def test_one_of_several_takes_a_free_lease(api: LeaseApi, locks: Locks, clock: Clock) -> None:
    first, second = locks(), locks()
    assert first.identity != second.identity
    assert first.take() and not second.take() and first.take()
    assert api.holder == first.identity and first.is_current and not second.is_current
    assert api.spec is not None and api.spec["leaseDurationSeconds"] == 15 and api.spec["leaseTransitions"] == 1
    first.release()
    assert not first.is_current and second.take() and api.spec["leaseTransitions"] == 2


def test_a_lease_runs_out_by_the_candidates_own_clock(api: LeaseApi, locks: Locks, clock: Clock) -> None:
    """The holder's clock may be years off; each renewal restarts the wait."""
    candidate = locks()
    for renewed in ("1970-01-01T00:00:00.000000Z", "2100-01-01T00:00:00.000000Z"):
        api.change(holderIdentity="other", leaseDurationSeconds=15, renewTime=renewed)
        assert not candidate.take(), "it has just been seen for the first time"
        clock.now += 14.9
        assert not candidate.take()
    clock.now += 0.2
    assert candidate.take() and api.holder == candidate.identity


def test_the_holders_duration_counts(api: LeaseApi, locks: Locks, clock: Clock) -> None:
    candidate = locks()
    api.change(holderIdentity="other", leaseDurationSeconds=60, renewTime="x")
    assert not candidate.take()
    clock.now += 59
    assert not candidate.take()
    clock.now += 2
    assert candidate.take()


def test_of_two_candidates_at_once_one_gets_it(api: LeaseApi, locks: Locks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four candidates read the free lease before one of them writes."""
    both_read, read = threading.Barrier(4), LeaseLock._read

    def together(self: LeaseLock) -> object:
        lease = read(self)
        both_read.wait(10)
        return lease

    monkeypatch.setattr(LeaseLock, "_read", together)
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(locks().take())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [False, False, False, True]


def test_a_conflict_is_no_loss(api: LeaseApi, locks: Locks, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command such as `helm upgrade` may write a label between a holder's read and its write."""
    holder = locks()
    assert holder.take()
    read = LeaseLock._read

    def changed_meanwhile(self: LeaseLock) -> object:
        lease = read(self)
        api.change()
        return lease

    clock.now += 5
    monkeypatch.setattr(LeaseLock, "_read", changed_meanwhile)
    holder.renew()
    assert holder.renewed_s == 1000.0
    monkeypatch.setattr(LeaseLock, "_read", read)
    holder.renew()
    assert holder.renewed_s == 1005.0


def test_a_holder_does_not_take_back_a_lease_that_another_one_has(api: LeaseApi, locks: Locks, clock: Clock) -> None:
    holder, standby = locks(), locks()
    assert holder.take() and not standby.take()
    clock.now += 15.1
    assert standby.take()
    with pytest.raises(SupersededError, match=f"{standby.identity} has the Lease brain now"):
        holder.renew()
    holder.release()
    assert api.holder == standby.identity


def test_the_time_of_a_renewal_is_when_it_was_sent(
    api: LeaseApi, locks: Locks, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = locks()
    put = LeaseLock._put

    def slow(self: LeaseLock, lease: dict[str, object]) -> bool:
        clock.now += 9
        return put(self, lease)

    monkeypatch.setattr(LeaseLock, "_put", slow)
    assert holder.take() and holder.is_current
    clock.now += 1.1
    assert not holder.is_current, "others may have waited since before the answer came"


@pytest.mark.parametrize(
    ("permits", "spec", "said"),
    [(False, {}, "the API server answers 403 leases is forbidden"), (True, None, "does not exist; create it")],
)
def test_what_stands_in_the_way_is_said(
    api: LeaseApi, locks: Locks, permits: bool, spec: dict[str, object] | None, said: str
) -> None:
    api.permits, api.spec = permits, spec
    with pytest.raises(LlamaclustError, match=said):
        locks().take()


@pytest.mark.parametrize(
    "spec",
    [
        *("text", [1], {"holderIdentity": ["other"]}, {"holderIdentity": "other", "leaseDurationSeconds": "15"}),
        {"holderIdentity": "", "leaseTransitions": "many"},
    ],
    ids=str,
)
def test_an_api_server_that_answers_nonsense_gives_no_lease(api: LeaseApi, locks: Locks, spec: Any) -> None:
    lock = locks()
    assert lock.take()
    api.spec = spec
    for attempt in (lock.renew, lock.take, lock.release, locks().take):
        with pytest.raises(LlamaclustError, match="did not answer with a Lease"):
            attempt()


@pytest.mark.parametrize("token", [b"\xff\xfe", b"a\nb", "\u00e9".encode()], ids=str)
def test_a_token_that_is_no_header_is_said(api: LeaseApi, locks: Locks, tmp_path: Path, token: bytes) -> None:
    lock = locks()
    (tmp_path / "account" / "token").write_bytes(token)
    with pytest.raises(LlamaclustError, match="Lease brain: http"):
        lock.take()


@pytest.mark.parametrize("kind", ["taken", "forbidden", "hangs"])
def test_a_holder_that_cannot_renew_loses_it_before_others_take_it(
    api: LeaseApi,
    locks: Locks,
    clock: Clock,
    kind: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Lease of 15 s is current for 10 s after a renewal."""
    monkeypatch.setattr(lease_module, "_RETRIES", 60.0)  # a renewal every quarter of a second
    lock, reasons, lost = locks(), list[str](), threading.Event()

    def note(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    assert lock.take()
    with held(lock, note):
        seen = api.version
        eventually(lambda: api.version > seen + 2, 60.0, "renewals")
        assert not reasons
        if kind == "taken":
            api.change(holderIdentity="other")
        else:
            if kind == "forbidden":
                api.permits = False
            else:
                lock._http.timeout = 0.2
                api.answers.clear()
            clock.now += 9.9
            eventually(lambda: "could not be renewed" in caplog.text, 60.0, "a renewal that fails")
            assert not reasons
            clock.now += 0.2
        assert lost.wait(60)
        expected = {"taken": "other has the Lease", "forbidden": "403", "hangs": "timed out"}[kind]
        assert expected in reasons[0]
        api.answers.set()


class Ready:
    """Stands for the API's replies while the cluster starts. Sets `ended` when they end."""

    def __init__(self, ended: threading.Event) -> None:
        self._ended = ended

    async def __aenter__(self) -> Ready:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._ended.set()

    def report(self, event: object) -> None:
        pass


def test_a_signal_while_a_lease_is_taken_leaves_it_free(
    api: LeaseApi, locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = LeaseLock.take

    def take(lock: LeaseLock) -> bool:
        is_taken = taken(lock)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(60)
        return is_taken

    ended, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(LeaseLock, "take", take)
    monkeypatch.setattr(leadership, "StartingReplies", lambda *given, **options: Ready(ended))
    try:
        port: Any = None
        with leadership.leading(locks.settings, port, port, lambda event: None) as is_leader:
            assert not is_leader
    finally:
        signal.signal(signal.SIGTERM, before)
    assert api.holder == "" and taken(locks())


def test_a_lease_that_is_given_up_is_free_at_once(api: LeaseApi, locks: Locks) -> None:
    lock, other = locks(), locks()
    assert lock.take()
    with held(lock, pytest.fail):
        assert not other.take()
    assert api.holder == "" and other.take()
