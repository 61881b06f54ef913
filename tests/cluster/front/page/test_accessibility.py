"""Checks that axe-core finds no serious violation in both views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.browser.chromium import opened
from support.browser.cluster_states import cluster_app, cluster_of, lose
from support.clusters.served import ScriptedEngine, says, serving

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "# Title\n\n[a](https://a.example) `b`\n\n```py\nc\n```\n\n| d | e |\n|---|---|\n| f | g |\n\n> h"
RUN = "axe.run(document, {resultTypes: ['violations']})"


async def serious(page: Page) -> list[tuple[str, list[Any]]]:
    """Returns the rules with serious or critical violations, with their elements."""
    from axe_playwright_python.async_playwright import Axe

    if not await page.evaluate("'axe' in window"):
        await page.evaluate(Axe().axe_script)
    found = (await page.evaluate(RUN))["violations"]
    return [
        (rule["id"], [(node["html"][:150], node["failureSummary"]) for node in rule["nodes"]])
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]


STAGE = {"worker": "a", "compute": 0.4, "queue": 0.1, "send": 0.1}
PREFILL = {"tokens": 20, "microbatches": 2, "stages": [STAGE], "links": 0.1, "idle": 0.1}
WATERFALL = {
    **{
        "id": "aaaa",
        "adapters": [],
        "end": None,
        "seconds": 1.0,
        "prompt_tokens": 20,
        "cached_tokens": 0,
        "generated_tokens": 1,
    },
    "phases": [
        {"phase": "waiting", "start": 0.0, "seconds": 0.2},
        {"phase": "prefill", "start": 0.2, "seconds": 0.8, **PREFILL},
    ],
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_serious_is_found(browser: Browser, scheme: str) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-core comes with axe-playwright-python")
    cluster = cluster_of("a", "b")
    app = cluster_app(lambda: cluster, engine=ScriptedEngine(says(TEXT)))
    async with serving(app) as address, opened(browser, address, color_scheme=scheme) as seen:
        page = seen.page
        assert await serious(page) == []
        await page.get_by_label("Message", exact=True).fill("Hi")
        await page.keyboard.press("Enter")
        await page.locator(".message.assistant:not(.streaming)").wait_for()
        assert await serious(page) == []
        await page.get_by_role("button", name="Settings").click()
        assert await serious(page) == []
        await page.get_by_role("button", name="Close").click()
        await page.get_by_role("link", name="Cluster").click()
        await page.locator(".picture .stage.ready").nth(1).wait_for()
        assert await serious(page) == []
        await page.route("**/cluster/requests/aaaa", lambda route: route.fulfill(json={"requests": [WATERFALL]}))
        await page.get_by_role("button", name="Time of request aaaa").click()
        await page.get_by_text("a: compute").wait_for()
        assert await serious(page) == []
        await page.get_by_role("button", name="Close").click()
        lose(cluster, "b")
        await page.locator(".picture .stage.lost").wait_for()
        assert await serious(page) == []
        seen.check()


async def test_no_form_loses_the_keyboard_s_focus(browser: Browser) -> None:
    app = cluster_app(lambda: cluster_of("a", "b"), engine=ScriptedEngine(says("Yes")))
    async with serving(app) as address, opened(browser, address) as seen:
        page = seen.page
        await page.locator("textarea:focus").wait_for()
        await page.keyboard.type("Hi")
        await page.keyboard.press("Enter")
        await page.locator(".message.assistant:not(.streaming)").wait_for()
        for opener, last in (
            ("Rename", "Escape"),
            ("Rename", "Enter"),
            ("Edit", "Escape"),
            ("Edit", "Cancel"),
            ("With seed…", "Cancel"),
        ):
            await page.get_by_role("button", name=opener).focus()
            await page.keyboard.press("Enter")
            await page.locator(":is(input, textarea):focus:not([aria-label=Message])").wait_for()
            if last == "Cancel":
                await page.get_by_role("button", name=last).focus()
            await page.keyboard.press(last.replace("Cancel", "Enter"))
            await page.locator("button:focus", has_text=opener).wait_for()
        await page.locator(".conversations .title").focus()
        await page.keyboard.press("Enter")
        await page.locator("textarea:focus").wait_for()
        seen.check()


async def test_the_page_is_usable_by_keys_and_on_a_narrow_screen(browser: Browser) -> None:
    app = cluster_app(lambda: cluster_of("a", "b"), engine=ScriptedEngine(says("Yes")))
    screen = {"width": 360, "height": 640}
    async with serving(app) as address, opened(browser, address, viewport=screen) as seen:
        page = seen.page
        await page.locator("textarea:focus").wait_for()
        await page.keyboard.type("Hi")
        await page.keyboard.press("Enter")
        await page.locator(".message.assistant:not(.streaming)").wait_for()
        width = "document.documentElement.scrollWidth <= innerWidth"
        assert await page.evaluate(width)
        await page.get_by_role("link", name="Cluster").focus()
        await page.keyboard.press("Enter")
        await page.locator(".picture .stage.ready").nth(1).wait_for()
        assert await page.evaluate(width)
        seen.check()
