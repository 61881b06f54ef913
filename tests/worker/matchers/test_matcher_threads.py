"""Tests of matchers used by two threads: the event loop receives inputs while the compute thread begins a step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llamaclust.worker.stage.matchers import StageMatchers
from support.chat.matching import ABC, VOCABULARY, inputs_of, task

_WAIT_S = 30.0


class OtherThread:
    """Calls a function once in another thread. `begin` returns when the call has ended or waits for the lock."""

    def __init__(self, stage: StageMatchers, what: Callable[[], object]) -> None:
        self._lock, self._what = stage._lock, what
        self._came = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        stage._lock = self  # type: ignore[assignment]

    def begin(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
            assert self._came.wait(_WAIT_S)

    def end(self) -> None:
        self._thread.join(_WAIT_S)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._what()
        except Exception as error:  # noqa: BLE001  raised by the thread that waits
            self._error = error
        finally:
            self._came.set()

    def __enter__(self) -> None:
        if threading.get_ident() == self._thread.ident:
            self._came.set()
        assert self._lock.acquire(timeout=_WAIT_S)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Changes(dict[Any, Any]):
    """A dict that starts the other thread after its keys are read, or after a key is removed."""

    after_look: OtherThread | None = None
    after_pop: OtherThread | None = None

    def __iter__(self) -> Iterator[Any]:
        keys = list(super().__iter__())
        if self.after_look is not None:
            self.after_look.begin()
        return iter(keys)

    def pop(self, *arguments: Any) -> Any:
        value = super().pop(*arguments)
        if self.after_pop is not None:
            self.after_pop.begin()
        return value


@pytest.fixture
def stage() -> Iterator[StageMatchers]:
    made = StageMatchers(lambda: VOCABULARY, most=3)
    made._changes = Changes()
    yield made
    made.close()


def test_an_answer_is_found_while_a_step_admits_it(stage: StageMatchers) -> None:
    inputs = inputs_of(0, task(1, 0, ABC))
    stage.receive(inputs)
    (answer,) = stage._changes.values()
    assert isinstance(stage._changes, Changes)
    other = stage._changes.after_look = OtherThread(stage, lambda: stage.begin(inputs.tasks))
    assert stage._find(0, 1) is answer
    other.end()
    assert stage._find(0, 1) is answer and not stage._changes


def test_a_release_is_seen_while_a_step_admits_what_it_releases(stage: StageMatchers) -> None:
    inputs = inputs_of(0, task(1, 0, ABC))
    stage.receive(inputs)
    (answer,) = stage._changes.values()
    assert isinstance(stage._changes, Changes)
    other = stage._changes.after_pop = OtherThread(stage, lambda: stage.receive(inputs_of(1, released=(1,))))
    stage.begin(inputs.tasks)
    other.end()
    assert answer is not None and answer.is_released


def test_a_closed_stage_keeps_no_vocabulary() -> None:
    stage = StageMatchers(lambda: VOCABULARY, most=3)
    stage.prepare()
    stage._threads.submit(0, 0, lambda: None).result(_WAIT_S)
    assert stage._vocabulary is VOCABULARY
    stage.close()
    assert stage._vocabulary is None
