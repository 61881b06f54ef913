"""Values that are computed once for all callers that wait at the same time. Each caller has its own deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

_Value = TypeVar("_Value")

Owners = Sequence[str]
"""Owners (for example API clients) of the callers that wait for a value. It is computed in the first owner's turn."""
Compute = Callable[[Owners], Coroutine[Any, Any, _Value]]


class Lease(Generic[_Value]):
    def __init__(self, value: _Value, release: Callable[[], None]) -> None:
        self.value = value
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()


class _Shared(Generic[_Value]):
    def __init__(self) -> None:
        self.result: asyncio.Future[_Value] = asyncio.get_running_loop().create_future()
        self.owners: list[str] = []
        self.task: asyncio.Task[_Value] | None = None  # None until a caller gets its turn.
        self.claim: asyncio.Task[None] | None = None  # Task that took the turn and began `task`.

    async def claim_turn(self, owner: str, turn: AbstractAsyncContextManager[None], begin: Callable[[], None]) -> None:
        """Waits for `turn`, begins the computation if necessary, and holds the turn until the computation ends."""
        async with turn:
            if self.task is None:
                self.claim = asyncio.current_task()
                self.owners.remove(owner)
                self.owners.insert(0, owner)
                begin()
            assert self.task is not None
            await asyncio.wait((self.task,))


class SharedComputations(Generic[_Value]):
    """Computes each value once for all callers with the same key. When the last caller has left, the computation is
    cancelled or its value is closed."""

    def __init__(self, close: Callable[[bytes, _Value], None] = lambda key, value: None) -> None:
        self._close = close
        self._shared: dict[bytes, _Shared[_Value]] = {}

    def __len__(self) -> int:
        return len(self._shared)

    def __contains__(self, key: bytes) -> bool:
        return key in self._shared

    def put(self, key: bytes, owner: str, value: _Value) -> Lease[_Value]:
        assert key not in self._shared
        self._shared[key] = shared = _Shared[_Value]()
        shared.result.set_result(value)
        return self._lease(key, owner, shared)

    async def take(
        self, key: bytes, owner: str, turn: AbstractAsyncContextManager[None], compute: Compute[_Value]
    ) -> Lease[_Value]:
        """Waits for a value and returns a lease of it. Raises the error of the computation or of `turn`."""
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = _Shared()
        lease = self._lease(key, owner, shared)
        claim: asyncio.Task[None] | None = None
        try:
            if not shared.result.done():
                claim = asyncio.create_task(shared.claim_turn(owner, turn, lambda: self._begin(key, shared, compute)))
                claim.add_done_callback(_retrieved)
                await asyncio.wait((shared.result, claim), return_when=asyncio.FIRST_COMPLETED)
                if not shared.result.done():
                    await claim  # Raises the error of the turn.
            lease.value = shared.result.result()
        except BaseException:
            lease.release()
            raise
        finally:
            if claim is not None and claim is not shared.claim:
                claim.cancel()
        return lease

    def _lease(self, key: bytes, owner: str, shared: _Shared[_Value]) -> Lease[_Value]:
        shared.owners.append(owner)
        lease: Lease[Any] = Lease(None, lambda: self._leave(key, owner, shared))
        if shared.result.done():
            lease.value = shared.result.result()
        return lease

    def _begin(self, key: bytes, shared: _Shared[_Value], compute: Compute[_Value]) -> None:
        shared.task = asyncio.create_task(compute(shared.owners))
        shared.task.add_done_callback(lambda task: self._ended(key, shared, task))

    def _ended(self, key: bytes, shared: _Shared[_Value], task: asyncio.Task[_Value]) -> None:
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            shared.result.cancel()
        elif error is not None:
            shared.result.set_exception(error)
            shared.result.exception()  # Otherwise asyncio logs the error if all callers have left.
        else:
            shared.result.set_result(task.result())
            if shared.owners:
                return
        self._end(key, shared)

    def _leave(self, key: bytes, owner: str, shared: _Shared[_Value]) -> None:
        shared.owners.remove(owner)
        if not shared.owners:
            self._end(key, shared)

    def _end(self, key: bytes, shared: _Shared[_Value]) -> None:
        self._forget(key, shared)
        if shared.task is not None and not shared.task.done():
            shared.task.cancel()
        elif shared.result.done() and not shared.result.cancelled() and shared.result.exception() is None:
            self._close(key, shared.result.result())

    def _forget(self, key: bytes, shared: _Shared[_Value]) -> None:
        if self._shared.get(key) is shared:
            del self._shared[key]


def _retrieved(claim: asyncio.Task[None]) -> None:
    if not claim.cancelled():
        claim.exception()  # Otherwise asyncio logs the error if the caller has left.
