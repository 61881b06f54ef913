"""Runs work in daemon threads, because a native call cannot be interrupted and Ctrl-C must not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

_Result = TypeVar("_Result")


def in_background(work: Callable[[], _Result]) -> Future[_Result]:
    done: Future[_Result] = Future()
    done.set_running_or_notify_cancel()
    Thread(target=_run, args=(work, done), daemon=True).start()
    return done


def _run(work: Callable[[], _Result], done: Future[_Result]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # noqa: BLE001  The future passes the exception on.
        done.set_exception(error)
