"""Checks that the chat loses no answer when connections, tabs, keys, servers and storage fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from llamaclust.wire.rpc.deadlines import deadline
from support.browser.chatting import answers, chatting, chunk, ended, send, use_key
from support.browser.chromium import Opened, opened
from support.browser.cluster_states import cluster_app
from support.clusters.served import ScriptedEngine, make_app, says, serving, until

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page, Route
    from starlette.applications import Starlette

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_running_answer_survives_a_reload(browser: Browser) -> None:
    engine = ScriptedEngine(says("Whole"))
    async with chatting(browser, engine) as seen:
        engine.gate.clear()
        await send(seen.page, "Hi")
        await until(lambda: engine.running == 1)
        await seen.page.reload()
        engine.gate.set()
        await seen.page.locator(".message.assistant .text", has_text="Whole").wait_for()
        await ended(seen.page)
        seen.check()
    assert len(engine.submitted) == 1


async def test_answers_of_other_chats_survive_a_reload(browser: Browser) -> None:
    engine = ScriptedEngine(says("Whole"))
    async with chatting(browser, engine) as seen:
        page = seen.page
        engine.gate.clear()
        for count, text in enumerate(("First", "Second"), 1):
            await page.get_by_role("button", name="New chat").click()
            await send(page, text)
            await until(lambda count=count: engine.running == count)  # type: ignore[misc]  # bound now
        await page.reload()
        await page.locator(".message.user .text", has_text="Second").wait_for()
        engine.gate.set()
        await ended(page)
        running = """async () => {
          const { History } = await import("/browser/chat/history.js");
          return (await (await History.open()).running()).length;
        }"""
        async with deadline("the ends of both answers", 60):
            while await page.evaluate(running):
                pass
        await page.locator(".conversations").get_by_role("button", name="First", exact=True).click()
        assert await answers(page) == ["Whole"]
        seen.check()
    assert len(engine.submitted) == 2


CUT_ONCE = """() => {
  const whole = window.fetch;
  let isCut = false;
  window.fetch = async (...parameters) => {
    const reply = await whole(...parameters);
    if (isCut || !String(parameters[0]).endsWith("/v1/chat/completions")) return reply;
    isCut = true;
    const reader = reply.body.getReader();
    let left = 700;
    const body = new ReadableStream({
      async pull(controller) {
        const { value } = await reader.read();
        controller.enqueue(value.slice(0, left));
        left -= value.length;
        if (left <= 0) { await reader.cancel(); controller.error(new TypeError("network error")); }
      },
    });
    return new Response(body, { status: reply.status, headers: reply.headers });
  };
}"""


async def test_a_cut_connection_costs_nothing_of_the_answer(browser: Browser) -> None:
    engine = ScriptedEngine(says("abcdefghijklmnopqrstuvwxyz"))
    async with chatting(browser, engine) as seen:
        await seen.page.evaluate(CUT_ONCE)
        await send(seen.page, "Hi")
        await ended(seen.page)
        assert await answers(seen.page) == ["abcdefghijklmnopqrstuvwxyz"]
        seen.check()
    assert len(engine.submitted) == 1


async def test_a_server_that_is_not_reached_is_waited_for(browser: Browser) -> None:
    engine, left = ScriptedEngine(says("Yes")), 4

    async def lose(route: Route) -> None:
        nonlocal left
        left -= 1
        await (route.continue_() if left < 0 else route.abort())

    async with chatting(browser, engine) as seen:
        await seen.page.route("**/v1/chat/completions", lose)
        await send(seen.page, "Hi")
        await seen.page.get_by_text("Waiting: the server is not reached").wait_for()
        await ended(seen.page)
        assert await answers(seen.page) == ["Yes"]
        assert await seen.page.get_by_text("Waiting").count() == 0
    assert len(engine.submitted) == 1


PLAIN_HTTP = """delete Crypto.prototype.randomUUID;
Object.defineProperty(navigator, "clipboard", { value: undefined });
Object.defineProperty(window, "indexedDB", { value: { open() { throw new Error("none") } } });"""


async def test_a_browser_that_gives_little_is_enough(browser: Browser) -> None:
    """Tests the page without the APIs that are absent without HTTPS and in some private windows."""
    async with chatting(browser, ScriptedEngine(says("Yes")), PLAIN_HTTP) as seen:
        page = seen.page
        await send(page, "Hi")
        await ended(page)
        assert await answers(page) == ["Yes"]
        await page.get_by_text("This browser cannot keep chats").wait_for()
        await page.get_by_role("button", name="Copy").click()
        await page.get_by_role("button", name="Copied").wait_for()
        await page.get_by_role("button", name="New chat").click()
        await page.locator(".conversations").get_by_role("button", name="Hi", exact=True).click()
        assert await answers(page) == ["Yes"]
        seen.check()


async def in_two_tabs(seen: Opened, text: str) -> tuple[Page, Page]:
    """Sends the first message of a chat, and opens the answered chat in another tab."""
    page = seen.page
    await send(page, text)
    await ended(page)
    other = await page.context.new_page()
    await other.goto(page.url)
    await ended(other)
    return page, other


async def test_two_tabs_lose_no_message_of_each_other(browser: Browser) -> None:
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        page, other = await in_two_tabs(seen, "First")
        for tab, text in ((page, "Second"), (other, "Third")):
            await send(tab, text)
            await ended(tab, 2)
            await tab.get_by_text("The answer is complete.").wait_for(state="attached")
        await page.reload()
        await page.get_by_text("2/2").wait_for()
        await page.get_by_role("button", name="Previous version").click()
        await page.locator(".message.user .text", has_text="Second").wait_for()
        seen.check()


async def test_later_turns_of_another_tab_stay_in_sight(browser: Browser) -> None:
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        page, other = await in_two_tabs(seen, "First")
        await send(other, "Second")
        await ended(other, 2)
        await other.get_by_text("The answer is complete.").wait_for(state="attached")
        await page.get_by_role("button", name="Rename").click()
        await page.get_by_label("Name of the chat").fill("Both")
        await page.keyboard.press("Enter")
        await page.get_by_role("button", name="Both", exact=True).wait_for()
        await page.reload()
        await page.locator(".message.user .text", has_text="Second").wait_for()
        assert await answers(page) == ["Yes", "Yes"]
        seen.check()


async def test_a_running_answer_waits_for_the_key_of_another_tab(browser: Browser) -> None:
    engine = ScriptedEngine(says("Whole"))
    async with serving(make_app(engine, api_keys=("first-key",))) as address, opened(browser, address) as seen:
        await use_key(seen.page, "first-key", is_kept=False)
        await seen.page.get_by_text("ready").wait_for()
        engine.gate.clear()
        await send(seen.page, "Hi")
        await until(lambda: engine.running == 1)
        other = await seen.page.context.new_page()
        await seen.page.close()
        await other.goto(address)
        await other.get_by_text("Waiting: this server needs an API key").wait_for()
        await use_key(other, "wrong-key")
        await other.get_by_text("Waiting: unknown API key").wait_for()
        await use_key(other, "first-key")
        engine.gate.set()
        await ended(other)
        assert await answers(other) == ["Whole"]
    assert len(engine.submitted) == 1


async def test_a_whole_answer_is_kept_by_a_tab_that_lost_it(browser: Browser) -> None:
    """Checks that another tab's complete version is kept, whichever is written last; removed chats stay removed."""
    kept = """async () => {
      const { History } = await import("/browser/chat/history.js");
      const [one, other] = [await History.open(), await History.open()];
      const messages = (fields) => ({ m: { id: "m", parent: null, role: "assistant", ...fields } });
      const conversation = { id: "c", title: "t", updated: 1, chosen: { "": "m" } };
      const begun = messages({ content: "ha", state: "streaming" });
      await one.save({ ...conversation, messages: begun });
      const half = await other.load("c");
      const whole = { ...conversation, messages: messages({ content: "half", state: "done" }) };
      await one.update(whole);
      Object.assign(half.messages.m, { content: "hal", state: "failed", error: "gone" });
      await other.update(half);
      const found = (await one.load("c")).messages.m;
      await other.remove("c");
      await one.update(whole);
      const removed = await one.load("c");
      await one.save(whole);
      const { state, content, error } = half.messages.m;
      return [found.content, found.state, state, content, error ?? null, removed ?? null, (await other.load("c")).id];
    }"""
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        assert await seen.page.evaluate(kept) == ["half", "done", "done", "half", None, None, "c"]


SAVES = """async ([body, saveMs]) => {
  const { Answering } = await import("/browser/chat/answering.js");
  const message = { id: "m", role: "assistant", content: "", state: "streaming", replyId: "r" };
  let now = 0;
  let saves = 0;
  performance.now = () => now;
  window.fetch = async () => new Response(body);
  const history = { update: async () => { saves++; now += saveMs; } };
  await new Answering(history, () => (now += 1000)).run({ id: "c", messages: { m: message } }, message, {});
  return saves;
}"""


@pytest.mark.parametrize(("save_ms", "saves"), [(10, 40), (1000, 5)])
async def test_slow_saves_of_a_growing_answer_are_rare(browser: Browser, save_ms: int, saves: int) -> None:
    """Reads 40 parts of an answer that come once a second."""
    body = "".join([*(chunk({"content": "a"}) for _ in range(40)), "data: [DONE]\n\n"])
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        assert saves <= await seen.page.evaluate(SAVES, [body, save_ms]) <= saves + 1


async def test_a_later_name_of_another_tab_stays(browser: Browser) -> None:
    named = """async () => {
      const { History } = await import("/browser/chat/history.js");
      const { rename } = await import("/browser/chat/conversation.js");
      const [one, other] = [await History.open(), await History.open()];
      await one.save({ id: "c", title: "t", updated: 1, chosen: {}, messages: {} });
      const [mine, theirs] = [await one.load("c"), await other.load("c")];
      const titles = [];
      for (const [first, its, second, old] of [[one, mine, other, theirs], [other, theirs, one, mine]]) {
        const before = Date.now();
        while (Date.now() === before);
        rename(its, `name ${titles.length}`);
        await first.save(its);
        await second.update(old);
        titles.push((await first.load("c")).title, old.title);
      }
      return titles;
    }"""
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        assert await seen.page.evaluate(named) == ["name 0", "name 0", "name 2", "name 2"]


async def test_chats_go_on_when_a_newer_page_takes_their_database(browser: Browser) -> None:
    upgrade = """() => new Promise((resolve) => {
      const opening = indexedDB.open("llamaclust", 99);
      opening.addEventListener("success", () => resolve(opening.result.close()));
    })"""
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        page, chats = seen.page, seen.page.locator(".conversations")
        await send(page, "First")
        await ended(page)
        await page.evaluate(upgrade)
        await page.get_by_role("button", name="New chat").click()
        await page.get_by_text("This browser cannot keep chats").wait_for()
        await send(page, "Second")
        await ended(page)
        await page.get_by_role("button", name="New chat").click()
        await chats.get_by_role("button", name="Second", exact=True).click()
        assert await answers(page) == ["Yes"]
        for label in ("Delete Second", "Really delete Second"):
            await page.get_by_role("button", name=label, exact=True).click()
        await chats.get_by_role("button", name="Second", exact=True).wait_for(state="detached")
        seen.check()


async def test_a_whole_answer_without_its_end_did_not_fail(browser: Browser) -> None:
    parts = [chunk({"content": "Whole"}), chunk({}, finish_reason="stop")]
    gone = {"error": {"message": "no reply is kept", "code": "reply_not_found"}}
    async with chatting(browser, ScriptedEngine(says("a"))) as seen:
        page = seen.page
        begun = {"body": "".join(parts), "content_type": "text/event-stream"}
        await page.route("**/v1/chat/completions", lambda route: route.fulfill(**begun))
        await page.route("**/v1/streams/*", lambda route: route.fulfill(status=404, json=gone))
        async with page.expect_response("**/v1/streams/*"):
            await send(page, "Hi")
        await page.get_by_text("The answer is complete.").wait_for(state="attached")
        await page.get_by_role("button", name="Send").wait_for()
        assert await answers(page) == ["Whole"] and await page.get_by_role("alert").count() == 0


async def test_a_reply_without_a_head_is_requested_again(browser: Browser) -> None:
    engine, held = ScriptedEngine(says("Yes")), list[Any]()

    async def hold(route: Route) -> None:
        if held:
            await route.continue_()
        else:
            held.append(route)

    async with chatting(browser, engine) as seen:
        await seen.page.clock.install()
        await seen.page.route("**/v1/chat/completions", hold)
        await send(seen.page, "Hi")
        await until(lambda: bool(held))
        await seen.page.clock.fast_forward(21_000)
        await ended(seen.page)
        assert await answers(seen.page) == ["Yes"]


COUNT_GIVEN_UP = """() => {
  const whole = window.fetch;
  window.givenUp = 0;
  window.fetch = (url, options) => {
    const isChat = String(url).endsWith("/v1/chat/completions");
    if (isChat) options.signal.addEventListener("abort", () => (window.givenUp += 1), { once: true });
    return whole(url, options);
  };
}"""


async def test_a_large_message_has_time_for_its_upload(browser: Browser) -> None:
    held = list[Any]()

    async def hold(route: Route) -> None:
        held.append(route)

    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        page = seen.page
        await page.clock.install()
        await page.route("**/v1/chat/completions", hold)
        await page.evaluate(COUNT_GIVEN_UP)
        await send(page, "x" * 70_000)
        await until(lambda: bool(held))
        await page.clock.fast_forward(45_000)
        assert await page.evaluate("window.givenUp") == 0
        await page.clock.fast_forward(20_000)
        assert await page.evaluate("window.givenUp") == 1


NO_STORAGE = """for (const name of ["localStorage", "sessionStorage"])
  Object.defineProperty(window, name, { get() { throw new DOMException("blocked", "SecurityError"); } });"""


async def test_a_browser_that_keeps_nothing_is_enough(browser: Browser) -> None:
    app = make_app(ScriptedEngine(says("Yes")), api_keys=("first-key",))
    async with serving(app) as address, opened(browser, address, NO_STORAGE) as seen:
        await use_key(seen.page, "first-key")
        await seen.page.get_by_text("ready").wait_for()
        for theme in ("dark", "light"):
            await seen.page.get_by_role("button", name="Dark or light").click()
            await seen.page.locator(f":root[data-theme={theme}]").wait_for()
        await seen.page.get_by_role("button", name="Settings").click()
        await seen.page.get_by_label("Seed").fill("11")
        await seen.page.get_by_role("button", name="Close").click()
        await send(seen.page, "Hi")
        await ended(seen.page)
        assert await answers(seen.page) == ["Yes"] and not [line for line in seen.errors if "401" not in line]


async def test_another_model_after_a_restart_is_named_and_answers(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    apps = [cluster_app(dict, model_name=name, engine=engine) for name in ("first", "second")]
    served = apps[:1]

    async def serve(scope: Any, receive: Any, reply: Any) -> None:
        await served[-1](scope, receive, reply)

    async with serving(cast("Starlette", serve)) as address, opened(browser, address) as seen:
        await seen.page.get_by_text("first: ready").wait_for()
        served.append(apps[1])
        await send(seen.page, "Hi")
        await ended(seen.page)
        assert await answers(seen.page) == ["Yes"]
        await seen.page.get_by_text("second: ready").wait_for()
        seen.check()
