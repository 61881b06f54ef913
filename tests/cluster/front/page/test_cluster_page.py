"""Tests of the cluster's page: losses and recoveries that it shows, and its actions on workers."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.wire.control.logs import LogTail
from support.browser.chromium import opened
from support.browser.cluster_states import bring_back, cluster_app, cluster_of, group, lose
from support.clusters.command_line import command_line
from support.clusters.served import MODEL, real_engine, serving
from support.clusters.static_cluster import named
from support.models.tiny_model import build_tiny_model

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Workers:
    """Two workers, of which `b` cannot be drained."""

    moves: list[str] = field(default_factory=list)
    log_of_a: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.log_of_a.set()

    async def drain(self, name: str) -> None:
        if name == "b":
            raise InsufficientMemoryError("12 MiB are missing")
        self.moves.append(f"drain {name}")

    def undrain(self, name: str) -> None:
        self.moves.append(f"undrain {name}")

    async def log(self, name: str) -> LogTail:
        if name == "a":
            await self.log_of_a.wait()
        return LogTail((f"log of {name}", "<b>second</b>"), 12)


async def test_machines_links_and_figures_are_shown(browser: Browser) -> None:
    async with (
        serving(cluster_app(lambda: cluster_of("a", "b"))) as address,
        opened(browser, f"{address}/#cluster") as seen,
    ):
        page = seen.page
        await page.locator(".picture .stage.ready").nth(1).wait_for()
        picture = await page.locator(".picture svg").text_content() or ""
        for text in ("layers 0–5", "layers 6–11", "busy 60 %", "0.40 ms round", "1.0 GiB/s", "coordinator"):
            assert text in picture, text
        assert await page.locator(".picture .link.active").count() == 3
        figures = await page.get_by_role("region", name="Figures").inner_text()
        assert "3 of 9" in await page.get_by_role("region", name="Requests").inner_text()
        assert await page.get_by_text("and 1 more").count() == 1
        assert "1 waiting" in figures and "9.10 ms" in figures and "plan 8.00 ms" in figures
        seen.check()


async def test_members_of_a_group_are_shown_with_their_shares(browser: Browser) -> None:
    cluster = cluster_of("a", "b", "c")
    group(cluster, {"a": 2, "b": 1})
    async with serving(cluster_app(lambda: cluster)) as address, opened(browser, f"{address}/#cluster") as seen:
        page = seen.page
        await page.locator(".picture .stage.ready").nth(2).wait_for()
        assert await page.locator(".picture .link.active").count() == 3, "to a, to c and back"
        assert await partners(page) == [("a", "b")]
        machines = await page.get_by_role("region", name="Machines").inner_text()
        picture = await page.locator(".picture svg").text_content() or ""
        for text in (machines, picture):
            assert "67 % of layers 0–5" in text and "33 % of layers 0–5" in text
        figures = await page.get_by_role("region", name="Figures").inner_text()
        assert "gathers of a+b" in figures and "1.50 ms" in figures and "plan 1.20 ms, mostly for b" in figures
        seen.check()


async def test_an_idle_machine_is_shown_with_its_reason(browser: Browser) -> None:
    cluster = cluster_of("a", "b")
    cluster["status"]["workers"][1] |= {"layers": None, "idle_reason": "with this worker, the plan would be slower"}
    async with serving(cluster_app(lambda: cluster)) as address, opened(browser, f"{address}/#cluster") as seen:
        machines = seen.page.get_by_role("region", name="Machines")
        await machines.get_by_text("not used: with this worker, the plan would be slower").wait_for()
        assert (await machines.inner_text()).count("not used") == 1
        seen.check()


async def partners(page: Page) -> list[tuple[str, str]]:
    """Returns the names of the machines in the picture that a line of a group joins."""
    ends = """() => [...document.querySelectorAll(".picture .partner")].map((line) => {
      const boxes = [...document.querySelectorAll(".picture .stage .box")];
      const matrix = line.getScreenCTM();
      return [0, line.getTotalLength()].map((at) => {
        const { x, y } = line.getPointAtLength(at).matrixTransform(matrix);
        const touches = (box) => x > box.left - 3 && x < box.right + 3 && y > box.top - 3 && y < box.bottom + 3;
        return boxes.find((box) => touches(box.getBoundingClientRect()))?.parentNode.querySelector(".name").textContent;
      });
    })"""
    return [(first, last) for first, last in await page.evaluate(ends)]


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize(
    ("groups", "joined"),
    [
        ([{"a": 2, "b": 1}, {"c": 1, "d": 1}], [("a", "b"), ("c", "d")]),
        ([{"a": 1, "b": 1, "c": 1}], [("a", "b"), ("a", "c")]),
        ([{"b": 1, "c": 3, "d": 1}], [("b", "c"), ("b", "d")]),
        ([], []),
    ],
)
async def test_lines_join_the_members_of_a_group(
    browser: Browser, groups: list[dict[str, int]], joined: list[tuple[str, str]], width: int
) -> None:
    cluster = cluster_of("a", "b", "c", "d")
    for shares in groups:
        group(cluster, shares)
    size = {"width": width, "height": 900}
    async with (
        serving(cluster_app(lambda: cluster)) as address,
        opened(browser, f"{address}/#cluster", viewport=size) as seen,
    ):
        await seen.page.locator(".picture .stage.ready").nth(3).wait_for()
        assert await partners(seen.page) == joined
        seen.check()


async def test_a_loss_and_its_recovery_are_seen(browser: Browser) -> None:
    cluster = cluster_of("a", "b")
    async with serving(cluster_app(lambda: cluster)) as address, opened(browser, f"{address}/#cluster") as seen:
        page = seen.page
        await page.locator(".picture .stage.ready").nth(1).wait_for()
        lose(cluster, "b")
        await page.locator(".picture .stage.lost").wait_for()
        await page.get_by_text("lost: b").wait_for()
        bring_back(cluster, "b")
        await page.locator(".picture .stage.ready").nth(1).wait_for()
        await page.get_by_text("recovered in 0.84 s").wait_for()
        events = await page.locator(".events li").all_inner_texts()
        assert [event for event in events if "b was lost" in event] and [
            event for event in events if "b is back" in event
        ]
        seen.check()


async def test_each_of_several_models_is_shown(browser: Browser) -> None:
    cluster, other = cluster_of("a", "b"), cluster_of("a", "b")
    models = [(MODEL, "ready", 2), ("other", "asleep", 0)]
    for state in (cluster, other):
        state["status"]["models"] = [
            {"name": name, "state": state, "requests": {"running": running, "waiting": 0}}
            for name, state, running in models
        ]
    nothing = dict.fromkeys(other["status"]["speed"]["predicted"])
    other["status"] |= {"model": "other", "state": "asleep", "epoch": None}
    other["status"]["speed"]["predicted"] = nothing
    other |= {"plan": None, "links": [], "sequences": []}
    async with serving(cluster_app(lambda: cluster)) as address, opened(browser, f"{address}/#cluster") as seen:
        page = seen.page
        await page.route("**/cluster?model=other", lambda route: route.fulfill(json=other))
        await page.locator(".picture .stage.ready").nth(1).wait_for()
        assert await page.get_by_role("button", name=f"{MODEL}: ready (2 running)", pressed=True).count() == 1
        await page.get_by_role("button", name="other: asleep").click()
        await page.get_by_role("button", name="other: asleep", pressed=True).wait_for()
        figures = await page.get_by_role("region", name="Figures").inner_text()
        assert "null" not in figures and "asleep" in figures
        assert await page.get_by_role("region", name="Requests").is_hidden()
        assert not await page.locator(".events li").all_inner_texts()
        await page.get_by_role("button", name=MODEL).click()
        await page.get_by_role("button", name=MODEL, pressed=True).wait_for()
        seen.check()


async def test_a_loss_between_two_readings_is_not_missed(browser: Browser) -> None:
    cluster = cluster_of("a", "b")
    async with serving(cluster_app(lambda: cluster)) as address, opened(browser, f"{address}/#cluster") as seen:
        await seen.page.locator(".picture .stage.ready").nth(1).wait_for()
        bring_back(cluster, "b")
        await seen.page.get_by_text("b was lost").wait_for()


async def test_workers_are_drained_and_used_again(browser: Browser) -> None:
    cluster, workers = cluster_of("a", "b"), Workers()
    async with (
        serving(cluster_app(lambda: cluster, workers)) as address,
        opened(browser, f"{address}/#cluster") as seen,
    ):
        page = seen.page
        await page.get_by_role("button", name="Drain a").click()
        cluster["status"]["workers"][0]["drained"] = True
        await page.get_by_role("button", name="Undrain a").click()
        await page.get_by_role("button", name="Log of a").click()
        await page.get_by_text("<b>second</b>").wait_for()
        await page.get_by_text("12 earlier lines").wait_for()
        await page.get_by_role("button", name="Close").click()
        seen.check()
        await page.get_by_role("button", name="Drain b").click()
        await page.get_by_text("12 MiB are missing").wait_for()
    assert workers.moves == ["drain a", "undrain a"]


async def test_a_late_log_is_not_shown_as_that_of_another_worker(browser: Browser) -> None:
    workers = Workers()
    workers.log_of_a.clear()
    app = cluster_app(lambda: cluster_of("a", "b"), workers)
    async with serving(app) as address, opened(browser, f"{address}/#cluster") as seen:
        page = seen.page
        await page.get_by_role("button", name="Log of a").click()
        await page.get_by_role("button", name="Close").click()
        await page.get_by_role("button", name="Log of b").click()
        shown = page.locator("pre.log")
        await shown.filter(has_text="log of b").wait_for()
        async with page.expect_response("**/workers/a/log") as late:
            workers.log_of_a.set()
        await (await late.value).finished()
        assert "log of b" in await shown.inner_text()


async def test_where_the_time_of_a_request_went_is_drawn(browser: Browser) -> None:
    async with real_engine() as (engine, _):
        cluster = cluster_of("a", "b")
        request = GenerationRequest("aaaa5678", tuple(range(20)), 12)
        assert [event async for event in engine.submit(request)]
        app = cluster_app(lambda: cluster, engine=engine)
        async with serving(app) as address, opened(browser, f"{address}/#cluster") as seen:
            page = seen.page
            ended = page.get_by_role("region", name="Ended requests")
            await ended.get_by_text("aaaa5678").wait_for()
            assert "length" in await ended.inner_text()
            await ended.get_by_role("button", name="Time of request aaaa5678").click()
            drawn = page.get_by_role("region", name="Waterfall")
            await drawn.get_by_text("decode, 11 tokens in 11 steps").wait_for()
            text = await drawn.inner_text()
            assert "20 prompt tokens, 12 generated, length" in text and "w1: compute" in text
            await page.get_by_role("button", name="Close").click()
            running = page.get_by_role("region", name="Requests", exact=True)
            await running.get_by_role("button", name="Time of request aaaa").click()
            await drawn.get_by_text("decode, 11 tokens").wait_for()
            await page.get_by_role("button", name="Close").click()
            seen.check()
            await running.get_by_role("button", name="Time of request bbbb").click()
            await drawn.get_by_text("no request 'bbbb' is open").wait_for()


async def test_a_killed_worker_of_a_real_cluster_is_seen(browser: Browser, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "tiny.gguf", context=256)
    with command_line() as line, line.cluster(model, workers=named("a", "b")) as cluster:
        async with opened(browser, f"{cluster.api}/#cluster") as seen:
            page = seen.page
            await page.locator(".picture .stage.ready").nth(1).wait_for()
            os.kill((await asyncio.to_thread(lambda: cluster.worker_pids))["b"], signal.SIGKILL)
            await page.get_by_text("b was lost").first.wait_for(timeout=10_000)
            await page.get_by_text("b is back").first.wait_for(timeout=30_000)
            await page.get_by_text("recovered in").first.wait_for(timeout=30_000)
            seen.check()
