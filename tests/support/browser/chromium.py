"""A headless Chromium that reaches this machine alone; tests are skipped where it or Playwright is not installed."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
_DEADLINE_MS: Final = 15_000


@dataclass
class Opened:
    """A page, with what its console said and which other hosts it tried to reach."""

    page: Page
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def check(self) -> None:
        """AssertionError for an error of the page or a request to another host."""
        assert not self.errors, self.errors
        assert not self.foreign, self.foreign


@asynccontextmanager
async def launched() -> AsyncIterator[Browser]:
    """A browser with a profile of its own; skips the tests where there is none."""
    reason = "the page is tested with Playwright (make .venv/.test)"
    api = pytest.importorskip("playwright.async_api", reason=reason)
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("the page is tested with Chromium (sudo make system-deps-test)")
    async with api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, headless=True, args=[*_ARGUMENTS])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def opened(browser: Browser, address: str, script: str = "", **context: Any) -> AsyncIterator[Opened]:
    """The page at an address, with storage of its own. `script` runs before it; `context`: options of Playwright, such
    as `color_scheme`."""
    storage = await browser.new_context(**context)
    try:
        storage.set_default_timeout(_DEADLINE_MS)
        if script:
            await storage.add_init_script(script)
        seen = Opened(await storage.new_page())
        _watch(seen, address)
        await seen.page.goto(address)
        yield seen
    finally:
        await storage.close()


def _watch(seen: Opened, address: str) -> None:
    origin = "/".join(address.split("/")[:3])
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on("console", lambda line: seen.errors.append(line.text) if line.type == "error" else None)
    seen.page.on("request", lambda sent: None if sent.url.startswith(origin) else seen.foreign.append(sent.url))
    seen.page.on("dialog", lambda dialog: seen.errors.append(f"dialog: {dialog.message}"))
