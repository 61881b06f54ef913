"""Finds a worker's coordinator. Tries all known addresses concurrently, with a separate backoff for each address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import LlamaclustError, RefusedError, UsageError, WorkerError

_log = logging.getLogger(__name__)

_BACKOFF = Backoff(0.2, 5.0)
_STAGGER_S = 0.25
"""Seconds between the first attempts at two addresses (RFC 8305, section 5)."""
_LOG_EVERY_S = 60.0
_IDLE_LOG_S = 3600.0
"""Seconds between two log lines while a worker waits for the next cluster, which may take days."""
_MOST_LOGGED = 16
_MOST_FOUND = 64
_FALSE_AFTER = 3
"""Number of failures after which an announced address may be replaced by a newly announced address."""

_Result = TypeVar("_Result")


@dataclass(slots=True, eq=False)
class Place:
    address: str
    failures: int = 0
    is_refused: bool = False  # The last attempt failed for a reason that another attempt does not change.
    is_found: bool = False  # True if the address was announced and not given by the user.

    @property
    def pause_s(self) -> float:
        return _BACKOFF.pause_s(self.failures - 1) if self.failures else 0.0


class CoordinatorSearch:
    """Searches for a coordinator at several addresses. Fails if all refuse, unless `discovers` or `stays` is True."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        discovers: bool = False,
        stays: bool = False,
        first_s: float | None = None,
    ) -> None:
        self.limit_s: float | None = None
        """Seconds within which a lost coordinator must return. None (no limit) if the worker was never a member."""
        self._places = [Place(address) for address in addresses]
        self._discovers = discovers
        self._stays = stays
        self._first_s = first_s  # Seconds within which the first coordinator must be found, or None for no limit.
        self._has_more = asyncio.Event()
        self._trying: dict[Place, asyncio.Task[Any]] = {}  # Keeps a reference to each running attempt.
        self._begun_s: float | None = None  # Time at which this search began, or None while the worker is a member.
        self._error: LlamaclustError | None = None
        self._logged: dict[str, float] = {}

    def admitted(self, address: str, limit_s: float) -> None:
        """Records that the coordinator at `address` accepted the worker."""
        self.limit_s = limit_s
        self._begun_s, self._error, self._logged = None, None, {}
        self._places = [
            place for place in self._places if place.address == address or not (place.is_found and place.failures)
        ]
        for place in self._places:
            place.failures, place.is_refused = 0, False

    def begin_anew(self) -> None:
        self.limit_s, self._begun_s, self._error, self._logged = None, None, None, {}
        for place in self._places:
            place.failures, place.is_refused = 0, False

    def add(self, address: str) -> None:
        """Adds an announced address. If 64 are known, replaces one that failed at least 3 times, or does nothing."""
        if any(place.address == address for place in self._places):
            return
        found = [place for place in self._places if place.is_found]
        if len(found) >= _MOST_FOUND and not self._dropped(max(found, key=lambda place: place.failures)):
            return
        self._places.append(Place(address, is_found=True))
        self._has_more.set()

    def _dropped(self, place: Place) -> bool:
        if place.failures < _FALSE_AFTER:
            return False
        self._places.remove(place)
        if (task := self._trying.pop(place, None)) is not None:
            task.cancel()
        return True

    async def reached(self, attempt: Callable[[str], Awaitable[_Result]]) -> tuple[Place, _Result]:
        """Calls `attempt` for all addresses concurrently. Returns the first success, or raises LlamaclustError."""
        self._trying = {}
        self._begin()
        try:
            async with asyncio.timeout_at(self._end_s):
                done = await self._first(attempt)
        except TimeoutError:
            reason = "no address answered" if self._error is None else str(self._error)
            raise WorkerError(f"{self._lacking}: {reason}") from self._error
        finally:
            for task in self._trying.values():
                task.cancel()
        return min(done, key=lambda task: task.exception() is not None).result()

    async def _first(self, attempt: Callable[[str], Awaitable[_Result]]) -> set[asyncio.Task[tuple[Place, _Result]]]:
        while True:
            self._has_more.clear()
            new = sorted((each for each in self._places if each not in self._trying), key=lambda each: each.failures)
            for number, place in enumerate(new):
                self._trying[place] = asyncio.create_task(self._repeat(place, number * _STAGGER_S, attempt))
            more = asyncio.create_task(self._has_more.wait())
            try:
                waits = [*self._trying.values(), more]
                limit_s = None if self._trying else _LOG_EVERY_S
                done, _ = await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                more.cancel()
            if not done:
                _log.info("no coordinator of the token's cluster is announced yet; still looking")
            if ended := done & {*self._trying.values()}:  # Attempts at dropped addresses do not count.
                return ended

    def failed(self, place: Place, error: LlamaclustError) -> None:
        """Records a failed attempt. Raises `error` if the worker was never a member and no address can succeed."""
        place.failures += 1
        place.is_refused = isinstance(error, UsageError)
        now_s, self._error = asyncio.get_running_loop().time(), error
        self._begin()
        # An address may belong to another program by now, so its refusal counts only if all addresses refuse.
        is_refused = not self._discovers and all(each.is_refused for each in self._places)
        is_final = not self._stays and (isinstance(error, RefusedError) or is_refused)
        if self.limit_s is None and is_final:
            raise error
        self._report(error, now_s)

    def _begin(self) -> None:
        if self._begun_s is None:
            self._begun_s = asyncio.get_running_loop().time()

    async def _repeat(
        self, place: Place, delay_s: float, attempt: Callable[[str], Awaitable[_Result]]
    ) -> tuple[Place, _Result]:
        await asyncio.sleep(max(delay_s, place.pause_s))
        while True:
            try:
                return place, await attempt(place.address)
            except LlamaclustError as error:
                self.failed(place, error)
            await asyncio.sleep(place.pause_s)

    def _report(self, error: LlamaclustError, now_s: float) -> None:
        every_s = _IDLE_LOG_S if self._stays and self.limit_s is None else _LOG_EVERY_S
        if now_s - self._logged.get(str(error), -every_s) < every_s:
            return
        limit = "" if self.limit_s is None else f" (for {self.limit_s:g} s at most, with weights kept)"
        addresses = " or ".join(place.address for place in self._places[:_MOST_LOGGED])
        _log.warning("waiting for the coordinator at %s%s: %s", addresses, limit, error)
        self._logged = {str(error): now_s, **dict(list(self._logged.items())[: _MOST_LOGGED - 1])}

    @property
    def _end_s(self) -> float | None:
        limit_s = self._first_s if self.limit_s is None else self.limit_s
        return None if limit_s is None or self._begun_s is None else self._begun_s + limit_s

    @property
    def _lacking(self) -> str:
        if self.limit_s is None:
            return f"no coordinator has accepted this worker within {self._first_s:g} s"
        return f"the coordinator is gone, and has not come back within {self.limit_s:g} s"
