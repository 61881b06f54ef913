"""Moves the event loop's clock, so that tests of deadlines need not wait."""

from __future__ import annotations

import asyncio

import pytest


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Moves the clock of the running event loop forward."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + seconds)
