"""Work in a thread that nobody waits for at the end: native calls hear no signal, and Ctrl-C is not to take as long
as they do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

_Result = TypeVar("_Result")


def in_background(work: Callable[[], _Result]) -> Future[_Result]:
    """What `work` returns or raises."""
    done: Future[_Result] = Future()
    done.set_running_or_notify_cancel()
    Thread(target=_run, args=(work, done), daemon=True).start()
    return done


def _run(work: Callable[[], _Result], done: Future[_Result]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # noqa: BLE001  the border of the thread
        done.set_exception(error)
