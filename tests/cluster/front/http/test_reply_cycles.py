"""Checks that ended replies are freed at once: reference cycles would hold them until a rare garbage collection."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.clusters.resumable import KEY, PATHS, Served, body_of, is_idle, served, stream
from support.clusters.served import until

_FREED = "llamaclust.", "uvicorn."
_RESUME_S = 0.05


async def _read(http: httpx.AsyncClient, path: str, number: int) -> None:
    fields = {} if path == "/completion" else {"n": 2}
    await stream(http, "POST", path, json=body_of(path, **fields))


async def _whole(http: httpx.AsyncClient, path: str, number: int) -> None:
    assert (await http.post(path, json=body_of(path, stream=False))).is_success


async def _given_up(http: httpx.AsyncClient, path: str, number: int) -> None:
    await stream(http, "POST", path, json=body_of(path), most=2)


async def _kept(http: httpx.AsyncClient, path: str, number: int) -> None:
    headers = {name: f"{value} {path} {number}" for name, value in KEY.items()}
    await stream(http, "POST", path, json=body_of(path), headers=headers)


async def _kept_and_given_up(http: httpx.AsyncClient, path: str, number: int) -> None:
    headers = {name: f"{value} {path} {number} given up" for name, value in KEY.items()}
    await stream(http, "POST", path, json=body_of(path), headers=headers, most=2)


async def _refused(http: httpx.AsyncClient, path: str, number: int) -> None:
    reply = await http.post(path, json=body_of(path, temperature=-1))
    assert reply.status_code == 400


@pytest.mark.parametrize("use", [_read, _whole, _given_up, _kept, _kept_and_given_up, _refused])
async def test_an_ended_reply_leaves_no_cycle(tmp_path: Path, use: Any) -> None:
    async with served(tmp_path / "journal", resume_s=_RESUME_S) as here:
        for path in PATHS:
            await use(here.http, path, 0)  # creates objects that are made once
        await _ended(here)
        with _garbage() as garbage:
            for path in PATHS:
                await use(here.http, path, 1)
            await _ended(here)
        assert not garbage, garbage.most_common()


async def test_a_failed_reply_leaves_no_cycle(tmp_path: Path) -> None:
    async with served(tmp_path / "journal") as here:
        await _whole(here.http, PATHS[0], 0)
        with _garbage() as garbage:
            here.pipeline.failure = "broken"
            reply = await here.http.post(PATHS[0], json=body_of(PATHS[0], n=3, stream=False))
            assert reply.json()["error"]["message"] == "broken"
            await _ended(here)
        assert not garbage, garbage.most_common()


async def _ended(here: Served) -> None:
    await until(lambda: is_idle(here.engine) and not here.replies.cache._entries)
    for _ in range(3):
        await asyncio.sleep(0)


@contextmanager
def _garbage() -> Iterator[Counter[str]]:
    """Yields counts by type, set at the end of the context, of objects that only a garbage collection frees."""
    counts: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield counts
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        types = [type(each) for each in gc.garbage]
        counts.update(f"{kind.__module__}.{kind.__qualname__}" for kind in types if kind.__module__.startswith(_FREED))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
