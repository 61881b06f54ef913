"""The chat in a browser, as a user handles it, against the real server and a scripted engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.vision import Vision
from support.browser.chromium import Opened, opened
from support.clusters.served import ScriptedEngine, make_app, serving

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page


@asynccontextmanager
async def chatting(
    browser: Browser, engine: ScriptedEngine, script: str = "", vision: Vision | None = None, **settings: Any
) -> AsyncIterator[Opened]:
    app = make_app(engine, vision=vision, **settings)
    async with serving(app, ApiSettings(**settings)) as address, opened(browser, address, script) as seen:
        await seen.page.get_by_text("ready").wait_for()
        yield seen


async def send(page: Page, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def use_key(page: Page, key: str, *, is_kept: bool = True) -> None:
    """Enters a key for all tabs, or for this one. The dialog may be open already, and then covers the button."""
    await page.get_by_role("button", name="API key").dispatch_event("click")
    await page.get_by_label("Key", exact=True).fill(key)
    await page.get_by_label("Keep it in this browser").set_checked(is_kept)
    await page.get_by_role("button", name="Use").click()


async def answers(page: Page) -> list[str]:
    return [text.strip() for text in await page.locator(".message.assistant > .text").all_inner_texts()]


async def ended(page: Page, count: int = 1) -> None:
    """Waits until so many answers are shown, and none runs."""
    await page.locator(".message.assistant:not(.streaming)").nth(count - 1).wait_for()


def chunk(delta: dict[str, Any], **more: Any) -> str:
    """An event of a streamed answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return f"id: x:1\ndata: {json.dumps({'seed': 1, 'choices': [choice]})}\n\n"
