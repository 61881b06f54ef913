"""Tests of the chat in a real browser: turns, versions, settings, history, parts of answers."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from support.browser.chatting import answers, chatting, chunk, ended, send, use_key
from support.browser.chromium import opened
from support.clusters.served import ScriptedEngine, make_app, says, serving, until

if TYPE_CHECKING:
    from playwright.async_api import Browser

PHONE = {"width": 360, "height": 740}
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.promise
async def test_a_turn_streams_and_the_next_one_carries_it(browser: Browser) -> None:
    engine = ScriptedEngine(says("**Yes**"))
    async with chatting(browser, engine) as seen:
        await send(seen.page, "Hi")
        await ended(seen.page)
        assert await answers(seen.page) == ["Yes"]
        assert await seen.page.locator(".message.assistant strong").inner_text() == "Yes"
        await send(seen.page, "More")
        await ended(seen.page, 2)
        seen.check()
    assert len(engine.submitted) == 2 and len(engine.submitted[1].prompt) > len(engine.submitted[0].prompt) + 10


async def test_stop_ends_the_answer_on_the_server(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    async with chatting(browser, engine) as seen:
        engine.gate.clear()
        await send(seen.page, "Hi")
        await until(lambda: engine.running == 1)
        await seen.page.get_by_role("button", name="Stop").click()
        await seen.page.get_by_text("stopped", exact=True).wait_for()
        engine.gate.set()
        await until(lambda: engine.running == 0)
        await seen.page.get_by_role("button", name="Send").wait_for()
        seen.check()


async def test_regenerating_keeps_both_versions_and_takes_a_seed(browser: Browser) -> None:
    engine = ScriptedEngine(lambda request: says(f"seed {request.seed}" if request.seed == 7 else "drawn")(request))
    async with chatting(browser, engine) as seen:
        page = seen.page
        await send(page, "Hi")
        await ended(page)
        await page.get_by_role("button", name="With seed…").click()
        await page.locator(".message footer input").fill("7")
        await page.keyboard.press("Enter")
        await page.locator(".message.assistant .text", has_text="seed 7").wait_for()
        await ended(page)
        assert await page.get_by_text("2/2").count() == 1
        await page.get_by_role("button", name="Previous version").click()
        assert await answers(page) == ["drawn"]
        await page.get_by_role("button", name="Regenerate").click()
        await page.get_by_text("3/3").wait_for()
        seen.check()
    assert engine.submitted[1].seed == 7 and engine.submitted[2].seed not in (7, engine.submitted[0].seed)


async def test_an_edited_message_is_another_branch(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    async with chatting(browser, engine) as seen:
        page = seen.page
        await send(page, "First")
        await ended(page)
        await page.get_by_role("button", name="Edit").click()
        await page.get_by_label("Edit the message").fill("Second")
        await page.locator("form.edit").get_by_role("button", name="Send").click()
        await page.locator(".message.user .text", has_text="Second").wait_for()
        await ended(page)
        await page.get_by_role("button", name="Previous version").click()
        await page.locator(".message.user .text", has_text="First").wait_for()
        assert await answers(page) == ["Yes"]
        seen.check()


COMPOSED = """(field) => {
  for (const composing of [{ isComposing: true }, { keyCode: 229 }])
    for (const key of ["Escape", "Enter"])
      field.dispatchEvent(new KeyboardEvent("keydown", { key, ...composing, bubbles: true, cancelable: true }));
}"""


async def test_keys_of_an_input_method_neither_send_nor_stop(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    async with chatting(browser, engine) as seen:
        page = seen.page
        field = page.get_by_label("Message", exact=True)
        await field.fill("に")
        await field.evaluate(COMPOSED)
        assert await field.input_value() == "に"
        engine.gate.clear()
        await page.keyboard.press("Enter")
        await until(lambda: engine.running == 1)
        await field.evaluate(COMPOSED)
        engine.gate.set()
        await ended(page)
        assert await answers(page) == ["Yes"]
        await page.get_by_role("button", name="Edit").click()
        edited = page.get_by_label("Edit the message")
        await edited.evaluate(COMPOSED)
        assert await edited.input_value() == "に"
        seen.check()


async def test_settings_go_with_the_request_and_stay(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    async with chatting(browser, engine) as seen:
        page = seen.page
        await page.get_by_role("button", name="Settings").click()
        await page.get_by_label("Temperature").fill("0.25")
        await page.get_by_label("Maximum tokens").fill("2")
        await page.get_by_label("Seed").fill("11")
        await page.get_by_role("button", name="Close").click()
        await send(page, "Hi")
        await ended(page)
        await page.reload()
        await ended(page)
        await page.get_by_role("button", name="Settings").click()
        assert await page.get_by_label("Temperature").input_value() == "0.25"
        seen.check()
    request = engine.submitted[0]
    assert (request.seed, request.max_new_tokens, request.params.temperature) == (11, 2, 0.25)


async def test_history_is_kept_and_deleted(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    async with chatting(browser, engine) as seen:
        page = seen.page
        await send(page, "Remember")
        await ended(page)
        await page.get_by_role("button", name="New chat").click()
        assert await answers(page) == []
        await page.reload()
        await ended(page)
        assert await answers(page) == ["Yes"]
        await page.get_by_role("button", name="Delete Remember").click()
        await page.get_by_role("button", name="Really delete Remember").click()
        await page.get_by_text("kept in this browser alone").wait_for()
        await page.reload()
        await page.get_by_text("kept in this browser alone").wait_for()
        seen.check()


async def test_the_list_of_chats_reads_no_chat(browser: Browser) -> None:
    """Checks that listing reads no chat, not even one of the page's former version."""
    listed = """async () => {
      const former = indexedDB.deleteDatabase("llamaclust");
      await new Promise((resolve) => former.addEventListener("success", resolve));
      const opening = indexedDB.open("llamaclust", 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
      await new Promise((resolve) => opening.addEventListener("success", resolve));
      const store = opening.result.transaction("conversations", "readwrite").objectStore("conversations");
      const chat = (id, updated) => ({ id, updated, title: `of ${id}`, messages: {} });
      for (const kept of [chat("a", 1), chat("c", 3), chat("b", 2)]) store.put(kept);
      await new Promise((resolve) => store.transaction.addEventListener("complete", resolve));
      opening.result.close();
      const { History } = await import("/browser/chat/history.js");
      const history = await History.open();
      await history.save(chat("d", 4));
      const refuse = () => { throw new Error("a chat was read"); };
      for (const read of ["get", "getAll", "openCursor"]) IDBObjectStore.prototype[read] = refuse;
      return (await history.list()).map(({ id, title, updated }) => `${id} ${title} ${updated}`);
    }"""
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        assert await seen.page.evaluate(listed) == ["d of d 4", "c of c 3", "b of b 2", "a of a 1"]
        seen.check()


async def test_reasoning_and_calls_are_shown(browser: Browser) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}}
    rest = {"index": 0, "function": {"arguments": '"Oslo"}'}}
    parts: list[dict[str, Any]] = [
        {"reasoning_content": "Think first"},
        {"content": "So"},
        {"tool_calls": [call]},
        {"tool_calls": [rest]},
    ]
    body = "".join([*map(chunk, parts), chunk({}, finish_reason="tool_calls"), "data: [DONE]\n\n"])
    async with chatting(browser, ScriptedEngine(says("a"))) as seen:
        page = seen.page
        answer = {"body": body, "content_type": "text/event-stream"}
        await page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
        await send(page, "Hi")
        await ended(page)
        assert await answers(page) == ["So"]
        assert "Oslo" in await page.locator(".call pre").inner_text()
        assert await page.locator(".call summary").inner_text() == "Call of weather"
        await page.locator(".assistant .reasoning summary").click()
        await page.get_by_text("Think first").wait_for()
        seen.check()


async def test_probabilities_are_shown_on_hover_and_by_keys(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    async with chatting(browser, engine) as seen:
        page = seen.page
        await page.get_by_role("button", name="Settings").click()
        await page.get_by_label("Show probabilities of tokens").check()
        await page.get_by_role("button", name="Close").click()
        await send(page, "Hi")
        await ended(page)
        await page.locator(".token").first.hover()
        await page.locator(".token-detail", has_text="%").wait_for()
        await page.locator(".tokens").focus()
        await page.keyboard.press("ArrowRight")
        assert await page.locator(".token.current").get_attribute("data-index") == "1"
        seen.check()
    assert engine.submitted[0].top_logprobs == 5


async def test_the_key_is_asked_for_and_may_stay_in_the_tab(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    app = make_app(engine, api_keys=("first-key",))
    async with serving(app) as address, opened(browser, address) as seen:
        page, urls = seen.page, list[str]()
        page.on("request", lambda request: urls.append(request.url))
        await use_key(page, "wrong-key", is_kept=False)
        await page.get_by_text("unknown API key").wait_for()
        await use_key(page, "first-key", is_kept=False)
        await page.get_by_text("tiny: ready").wait_for()
        await send(page, "Hi")
        await ended(page)
        stored = await page.evaluate("[JSON.stringify(localStorage), document.cookie, location.href]")
        assert await answers(page) == ["Yes"] and "first-key" not in str(stored) + str(urls)
        assert await page.evaluate("sessionStorage.getItem('llamaclust.key')") == "first-key"


async def test_a_key_that_no_header_carries_is_refused_or_replaced(browser: Browser) -> None:
    app = make_app(ScriptedEngine(says("Yes")), api_keys=("first-key",))
    kept = "localStorage.setItem('llamaclust.key', 'schlüssel–1')"
    async with serving(app) as address, opened(browser, address, kept) as seen:
        await seen.page.get_by_label("Key", exact=True).wait_for()
        assert await seen.page.get_by_label("Key", exact=True).input_value() == ""
        await use_key(seen.page, "first–key")
        await seen.page.get_by_text("An API key has printable ASCII characters alone").wait_for()
        await use_key(seen.page, "first-key")
        await seen.page.get_by_text("tiny: ready").wait_for()


async def test_a_kept_key_serves_all_tabs_and_can_be_forgotten(browser: Browser) -> None:
    app = make_app(ScriptedEngine(says("Yes")), api_keys=("first-key",))
    async with serving(app) as address, opened(browser, address) as seen:
        other = await seen.page.context.new_page()
        await other.goto(address)
        await other.get_by_label("Key", exact=True).wait_for()
        await use_key(seen.page, "first-key")
        for page in (seen.page, other):
            await page.get_by_text("tiny: ready").wait_for()
        await other.close()
        await use_key(seen.page, "")
        await seen.page.reload()
        await seen.page.get_by_label("Key", exact=True).wait_for()
        assert "first-key" not in await seen.page.evaluate("JSON.stringify({...localStorage, ...sessionStorage})")


async def test_a_server_without_keys_offers_none(browser: Browser) -> None:
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        await seen.page.get_by_text("tiny: ready").wait_for()
        assert not await seen.page.get_by_role("button", name="API key").is_visible()


async def test_a_chat_is_renamed_and_saved_as_files(browser: Browser) -> None:
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        page = seen.page
        await send(page, "Hi")
        await ended(page)
        await page.get_by_role("button", name="Rename").click()
        await page.get_by_label("Name of the chat").fill("My notes")
        await page.keyboard.press("Enter")
        await page.get_by_role("button", name="My notes", exact=True).wait_for()
        await page.reload()
        await ended(page)
        saved = {}
        for name in ("Save as Markdown", "Save for llamaclust chat"):
            async with page.expect_download() as download:
                await page.get_by_role("button", name=name).click()
            file = await download.value
            path = await file.path()
            saved[file.suggested_filename] = await asyncio.to_thread(path.read_text, encoding="utf-8")
        seen.check()
    assert saved["My notes.md"] == "# My notes\n\n## You\n\nHi\n\n## Answer\n\nYes\n"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert json.loads(saved["My notes.json"]) == {"messages": messages}


async def test_the_chats_of_a_phone_have_the_whole_screen(browser: Browser) -> None:
    app = make_app(ScriptedEngine(says("Yes")))
    async with (
        serving(app) as address,
        opened(browser, address, viewport=PHONE, is_mobile=True, has_touch=True) as seen,
    ):
        page = seen.page
        fields = page.locator("input, textarea, select")
        sizes = await fields.evaluate_all("fields => fields.map(field => getComputedStyle(field).fontSize)")
        assert {*sizes} == {"16px"}
        await send(page, "Hi")
        await ended(page)
        assert not await page.get_by_role("navigation", name="Chats").is_visible()
        height = await page.locator(".talk").evaluate("node => node.clientHeight")
        assert height > 0.85 * 740
        await page.get_by_role("button", name="Chats", exact=True).click()
        await page.get_by_role("button", name="Hi", exact=True).click()
        assert await answers(page) == ["Yes"]
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360
        seen.check()


@pytest.mark.parametrize("way", ["escape", "beside", "button", "turned"])
async def test_the_list_of_chats_closes_on_a_phone(browser: Browser, way: str) -> None:
    app = make_app(ScriptedEngine(says("Yes")))
    async with (
        serving(app) as address,
        opened(browser, address, viewport=PHONE, is_mobile=True, has_touch=True) as seen,
    ):
        page = seen.page
        await send(page, "Hi")
        await ended(page)
        chats = page.get_by_role("navigation", name="Chats")
        for _ in range(2):
            await page.get_by_role("button", name="Chats", exact=True).click()
            await chats.wait_for(state="visible")
            box = await chats.bounding_box()
            assert box is not None and box["width"] < PHONE["width"]  # The rest of the screen shows the chat.
            if way == "escape":
                await page.keyboard.press("Escape")
            elif way == "beside":
                await page.touchscreen.tap(PHONE["width"] - 8, PHONE["height"] / 2)
            elif way == "button":
                await page.get_by_role("button", name="Close the list").click()
            else:
                await page.set_viewport_size({"width": 1000, "height": 700})
                await page.set_viewport_size(PHONE)
            await chats.wait_for(state="hidden")
            assert await answers(page) == ["Yes"]
        await send(page, "More")
        await ended(page)
        seen.check()


async def test_a_dialog_does_not_outlast_its_view(browser: Browser) -> None:
    async with chatting(browser, ScriptedEngine(says("Yes"))) as seen:
        page = seen.page
        await page.get_by_role("button", name="Settings").click()
        await page.evaluate("location.hash = 'cluster'")
        await page.get_by_role("button", name="Settings").wait_for(state="hidden")
        await page.get_by_role("link", name="Chat").click()
        await send(page, "Hi")
        await ended(page)


async def test_a_refusal_is_shown_with_its_reason(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    async with chatting(browser, engine) as seen:
        await send(seen.page, "x" * 400)
        alert = seen.page.get_by_role("alert")
        await alert.wait_for()
        assert "200" in await alert.inner_text()
