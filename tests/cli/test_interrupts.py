"""Checks that signals end the process, after a section that defers them or at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from llamaclust.cli.interrupts import exits_on_signals


@pytest.fixture(autouse=True)
def _no_signal_is_ignored() -> Iterator[None]:
    """Sets the default handlers, even if the parent process ignores the signals."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_heard_at_the_end_of_a_part_that_holds_it() -> None:
    reached: list[str] = []
    with pytest.raises(SystemExit) as ended, exits_on_signals(signal.SIGTERM) as held:
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("the end of the part")
        reached.append("what comes after")
    assert (ended.value.code, reached) == (128 + signal.SIGTERM, ["the end of the part"])


def test_another_signal_does_not_change_how_the_process_ends() -> None:
    with pytest.raises(SystemExit), exits_on_signals(signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(20)
    assert {signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)} == {signal.SIG_IGN}


def test_signals_that_did_not_come_are_as_before() -> None:
    with exits_on_signals(signal.SIGTERM):
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_signals_are_heard_at_once() -> None:
    reached: list[str] = []
    with pytest.raises(SystemExit) as ended, exits_on_signals(signal.SIGHUP) as held:
        with held():
            pass
        os.kill(os.getpid(), signal.SIGHUP)
        reached.append("what comes after")
    assert (ended.value.code, reached) == (128 + signal.SIGHUP, [])


class SignalledInDestructor:
    """An object whose destructor gets a signal; Python discards exceptions that are raised in destructors."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass


def test_a_signal_within_a_destructor_is_not_lost() -> None:
    with pytest.raises(SystemExit) as ended, exits_on_signals(signal.SIGTERM):
        SignalledInDestructor()
        time.sleep(20)
    assert ended.value.code == 128 + signal.SIGTERM
