"""Tests of images in the page's chat: picked, pasted, dropped, shown, sent, and kept with the conversation."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from llamaclust.core.limits import MAX_BODY_BYTES
from support.browser.chatting import answers, chatting, ended, send
from support.chat.vision import TinyVision
from support.clusters import served as served_module
from support.clusters.served import ScriptedEngine, says

if TYPE_CHECKING:
    from playwright.async_api import Browser, Locator, Page

pytestmark = pytest.mark.asyncio(loop_scope="module")
TRANSFER = """([data, type, name]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
}"""

PASTE = """(field, clipboardData) => {
  field.dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true }));
}"""


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)


def png(red: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 0, 0)).save(out, "PNG")
    return out.getvalue()


def picked(name: str, data: bytes, kind: str = "image/png") -> Any:
    return {"name": name, "mimeType": kind, "buffer": data}


async def pick(page: Page, *files: Any) -> None:
    await page.locator("input[type=file]").set_input_files([*files])


async def transfer(page: Page, data: bytes, kind: str = "image/png", name: str = "a.png") -> Any:
    return await page.evaluate_handle(TRANSFER, [base64.b64encode(data).decode(), kind, name])


def chosen(page: Page) -> Locator:
    return page.locator(".chosen-images img")


async def test_images_are_picked_pasted_and_dropped_and_reach_the_model_in_order(browser: Browser) -> None:
    engine, vision = ScriptedEngine(says("Red")), TinyVision()
    async with chatting(browser, engine, vision=vision) as seen:
        page = seen.page
        await pick(page, picked("a.png", png(1)))
        await chosen(page).nth(0).wait_for()
        field = page.get_by_label("Message", exact=True)
        pasted = await transfer(page, png(2))
        await field.evaluate(PASTE, pasted)
        await chosen(page).nth(1).wait_for()
        dropped = await transfer(page, png(3))
        for event in ("dragover", "drop"):
            await page.locator(".talk").dispatch_event(event, {"dataTransfer": dropped})
        await chosen(page).nth(2).wait_for()
        await page.get_by_role("button", name="Remove image 2").click()
        await send(page, "Which colour?")
        await ended(page)
        assert await answers(page) == ["Red"] and await chosen(page).count() == 0
        shown = page.locator(".message.user .images img")
        assert await shown.count() == 2
        assert await shown.first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 6
        await send(page, "And now?")
        await ended(page, 2)
        await page.reload()
        await page.locator(".message.user .images img").nth(1).wait_for()
        seen.check()
    assert [source.data for source in vision.images] == [png(1), png(3)] * 2
    assert [len(request.images) for request in engine.submitted] == [2, 2]


async def test_an_image_may_be_sent_alone_and_stays_when_its_text_is_edited(browser: Browser) -> None:
    engine, vision = ScriptedEngine(says("Red")), TinyVision()
    async with chatting(browser, engine, vision=vision) as seen:
        page = seen.page
        await pick(page, picked("a.png", png(1)))
        await chosen(page).first.wait_for()
        await page.get_by_role("button", name="Send").click()
        await ended(page)
        await page.get_by_role("button", name="Edit").click()
        await page.get_by_label("Edit the message").fill("Which colour?")
        await page.locator("form.edit").get_by_role("button", name="Send").click()
        await page.locator(".message.user .text", has_text="Which colour?").wait_for()
        await ended(page)
        seen.check()
    assert [source.data for source in vision.images] == [png(1)] * 2
    assert len(engine.submitted[1].prompt) > len(engine.submitted[0].prompt)


async def test_other_files_and_models_of_text_take_none(browser: Browser) -> None:
    engine = ScriptedEngine(says("Yes"))
    async with chatting(browser, engine, vision=TinyVision()) as seen:
        await pick(seen.page, picked("a.svg", b"<svg/>", "image/svg+xml"))
        await seen.page.get_by_text("a.svg: not a PNG, JPEG, WebP, GIF or BMP file.").wait_for()
        assert await chosen(seen.page).count() == 0
        seen.check()
    async with chatting(browser, engine) as seen:
        page = seen.page
        assert not await page.get_by_role("button", name="Add images").is_visible()
        await page.locator(".talk").dispatch_event("drop", {"dataTransfer": await transfer(page, png(1))})
        await page.get_by_text("This model reads text only.").wait_for()
        assert await chosen(page).count() == 0
        seen.check()


COPIED = """(field, transfer) => {
  const taken = (name) => {
    if (name) transfer.items.add("a\\tb", name);
    const event = new ClipboardEvent("paste", { clipboardData: transfer, cancelable: true });
    return !field.dispatchEvent(event);
  };
  return ["", "text/html", "text/plain"].map(taken);
}"""


async def test_a_paste_with_text_is_the_browser_s(browser: Browser) -> None:
    """Spreadsheets copy cells as text and as an image of them."""
    async with chatting(browser, ScriptedEngine(says("Red")), vision=TinyVision()) as seen:
        field = seen.page.get_by_label("Message", exact=True)
        assert await field.evaluate(COPIED, await transfer(seen.page, png(1))) == [True, True, False]
        seen.check()


DROPPED = """([selector, transfer]) => {
  const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
  const kept = (name) => !document.querySelector(selector).dispatchEvent(new DragEvent(name, options));
  return ["dragover", "drop"].map(kept);
}"""


async def test_no_dropped_file_replaces_the_page(browser: Browser) -> None:
    async with chatting(browser, ScriptedEngine(says("Red")), vision=TinyVision()) as seen:
        page = seen.page
        for place in (".head", ".history", ".talk"):
            dropped = await transfer(page, b"%PDF", "application/pdf", "a.pdf")
            assert await page.evaluate(DROPPED, [place, dropped]) == [True, True]
        await page.get_by_text("a.pdf: not a PNG, JPEG, WebP, GIF or BMP file.").wait_for()
        text = await page.evaluate_handle("() => new DataTransfer()")
        assert await page.evaluate(DROPPED, [".talk", text]) == [False, False]
        seen.check()


HELD = """
const read = FileReader.prototype.readAsDataURL;
window.held = [];
FileReader.prototype.readAsDataURL = function (file) { held.push(() => read.call(this, file)); };
"""
UNREADABLE = """
FileReader.prototype.readAsDataURL = function () {
  Object.defineProperty(this, "error", { value: new DOMException("it is gone") });
  this.dispatchEvent(new ProgressEvent("error"));
};
"""


async def test_a_message_waits_for_files_that_are_still_read(browser: Browser) -> None:
    engine, vision = ScriptedEngine(says("Red")), TinyVision()
    async with chatting(browser, engine, HELD, vision=vision) as seen:
        page = seen.page
        await pick(page, picked("a.png", png(1)))
        await pick(page, picked("b.png", png(2)))
        await page.get_by_text("Reading images…").wait_for()
        await send(page, "Which colours?")
        await page.keyboard.press("Enter")
        assert await page.locator(".message").count() == 0
        assert await page.get_by_label("Message", exact=True).input_value() == "Which colours?"
        for _ in range(2):  # one file is read after the other
            await page.wait_for_function("held.length > 0")
            await page.evaluate("held.shift()()")
        await ended(page)
        assert await page.locator(".message.user").count() == 1 and await chosen(page).count() == 0
        seen.check()
    assert [source.data for source in vision.images] == [png(1), png(2)] and len(engine.submitted) == 1


async def test_a_message_that_waits_for_files_stays_if_another_chat_is_opened(browser: Browser) -> None:
    engine, vision = ScriptedEngine(says("Red")), TinyVision()
    async with chatting(browser, engine, HELD, vision=vision) as seen:
        page = seen.page
        await send(page, "Hello")
        await ended(page)
        await pick(page, picked("a.png", png(1)))
        await page.get_by_text("Reading images…").wait_for()
        await send(page, "Which colour?")
        await page.get_by_role("button", name="New chat").first.click()
        await page.get_by_text("The message was not sent: another chat was opened.").wait_for(state="attached")
        await page.evaluate("held.shift()()")
        await chosen(page).first.wait_for()
        assert await page.locator(".message").count() == 0 and len(engine.submitted) == 1
        assert await page.get_by_label("Message", exact=True).input_value() == "Which colour?"
        await page.get_by_role("button", name="Send").click()
        await ended(page)
        assert await page.locator(".message.user").count() == 1 and await chosen(page).count() == 0
        seen.check()
    assert [source.data for source in vision.images] == [png(1)] and len(engine.submitted) == 2


async def test_images_of_a_message_keep_to_the_server_s_limit(browser: Browser) -> None:
    async with chatting(browser, ScriptedEngine(says("Red")), vision=TinyVision(), max_body_bytes=1 << 20) as seen:
        await pick(seen.page, picked("a.png", bytes((11 << 16) + 1)))
        await seen.page.get_by_text("The images of a message have at most 0.7 MiB.").wait_for()
        await pick(seen.page, picked("a.png", bytes(11 << 16)))
        await chosen(seen.page).first.wait_for(state="attached")
        seen.check()


async def test_a_file_that_cannot_be_read_is_named_and_nothing_is_sent_without_it(browser: Browser) -> None:
    engine = ScriptedEngine(says("Red"))
    async with chatting(browser, engine, UNREADABLE, vision=TinyVision()) as seen:
        page = seen.page
        await pick(page, picked("a.png", png(1)))
        await page.get_by_text("a.png: cannot be read: it is gone").wait_for()
        await send(page, "Hello")
        await ended(page)
        assert await page.locator(".message.user .images").count() == 0 and len(engine.submitted) == 1
        seen.check()


async def test_a_long_chat_goes_on_without_its_oldest_images_and_says_so(browser: Browser) -> None:
    engine, vision = ScriptedEngine(says("Red")), TinyVision()
    async with chatting(browser, engine, vision=vision) as seen:
        page = seen.page
        for turn in range(2):
            await pick(page, *(picked(f"{at}.png", png(40 * turn + at)) for at in range(40)))
            await chosen(page).nth(39).wait_for()
            await send(page, "Which colours?")
            await ended(page, turn + 1)
        await page.get_by_text("without the first 16 images of this chat").wait_for()
        assert await page.locator(".message.user .images img").count() == 80
        seen.check()
    assert [source.data for source in vision.images[40:]] == [png(at) for at in range(16, 80)]


SENT = """async ([sizes, bodyBytes]) => {
  const { addMessage, newConversation, sentMessages } = await import("/browser/chat/conversation.js");
  const conversation = newConversation("Be.");
  let parent = null;
  for (const [place, size] of sizes.entries()) {
    const images = size ? [`${place}`.padEnd(size * 2 ** 20, "x")] : [];
    const question = addMessage(conversation, parent, { role: "user", content: place ? "é" : "", images });
    parent = addMessage(conversation, question.id, { role: "assistant", content: "a" }).id;
  }
  const { messages, unsent } = sentMessages(conversation, parent, bodyBytes);
  const part = ({ text, image_url: image }) => text ?? image.url.slice(0, 1);
  const shown = messages.map(({ content }) => (Array.isArray(content) ? content.map(part) : content));
  return { shown: shown.filter((content) => content !== "a"), unsent, size: new Blob([JSON.stringify(messages)]).size };
}"""


@pytest.mark.parametrize(
    ("sizes", "unsent", "shown"),
    [
        ([4, 4, 0, 7], 0, ["Be.", ["0"], ["1", "é"], "é", ["3", "é"]]),
        ([4, 4, 0, 8], 1, ["Be.", "", ["1", "é"], "é", ["3", "é"]]),
        ([1, 4, 4, 8], 2, ["Be.", "", ["é"], ["2", "é"], ["3", "é"]]),
    ],
)
async def test_images_of_a_request_fit_its_body(
    sizes: list[int], unsent: int, shown: list[Any], browser: Browser
) -> None:
    async with chatting(browser, ScriptedEngine(says("Red"))) as seen:
        found = await seen.page.evaluate(SENT, [sizes, MAX_BODY_BYTES])
    assert found["unsent"] == unsent and found["shown"] == shown and found["size"] < MAX_BODY_BYTES - 1000
