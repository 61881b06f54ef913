"""Checks that markup in texts and names of models and workers is not interpreted; tests the page's pure modules."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from support.browser.chromium import Opened, opened
from support.browser.cluster_states import cluster_app, cluster_of
from support.clusters.served import ScriptedEngine, says, serving

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVIL = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'
EVIL_ANSWERS = (
    EVIL,
    f"```html\n{EVIL}\n```",
    f"`{EVIL}` | {EVIL}",
    f"| {EVIL} |\n|---|\n| {EVIL} |",
    "[a](javascript:window.pwned=1) [b](JaVaScRiPt:window.pwned=1) [c](data:text/html,<script>1</script>)",
    "[a](java\tscript:window.pwned=1) [b](\x01javascript:window.pwned=1) <javascript:window.pwned=1>",
    "![x](https://evil.example/x.png) ![y](javascript:window.pwned=1)",
    '[a](https://e.example/"onmouseover="window.pwned=1) <https://e.example/"onclick="1>',
    f"# {EVIL}\n> {EVIL}\n\n- {EVIL}\n1. {EVIL}\n\n**{EVIL}** ~~{EVIL}~~",
    "```<img src=x onerror=window.pwned=1>\ncode\n```",
    "&lt;img src=x onerror=window.pwned=1&gt; &#60;script&#62;",
    "<svg onload=window.pwned=1><a xlink:href='javascript:window.pwned=1'>x</a></svg>",
)
SHOW = """async (texts) => {
  const { MarkdownView } = await import("/browser/text/markdown.js");
  const parent = document.createElement("div");
  document.body.append(parent);
  for (const text of texts)
    for (let end = 1; end <= text.length; end++) new MarkdownView(parent).show(text.slice(0, end));
  const all = [...parent.querySelectorAll("*")];
  return {
    tags: [...new Set(all.map((node) => node.localName))],
    addresses: [...new Set(all.map((node) => node.getAttribute("href")).filter(Boolean))],
    attributes: [...new Set(all.flatMap((node) => node.getAttributeNames()))],
  };
}"""
TAGS = (
    "p h3 h4 h5 h6 a strong em del code pre figure figcaption span button ul ol li blockquote table thead tbody "
    "tr th td div br hr"
)
ATTRIBUTES = "href target rel class tabindex role aria-label type start title"


TREES: dict[str, Any] = {
    "a **b** _c_ ~~d~~ `e`": ["strong", "emphasis", "deleted", "code"],
    "snake_case_name and 2*3*4": ["emphasis"],
    "***both***": ["strong"],
    "\\*plain\\*": [],
    "see https://a.example/x_(y).": ["link"],
    "[t](https://a.example   'title') <https://b.example>": ["link", "link"],
    "unfinished **bold and `code": [],
    "a\nb": ["break"],
    "As in [1], see the [docs](https://a.example).": ["link"],
    "[a [b] \\] c](https://a.example) [x](y) [x]() [x](javascript:y)": ["link"],
    "[![badge](https://a.example/b.svg)](https://a.example)": ["link"],
    "[`a]` b](https://a.example)": ["link"],
    "**Name**: ____________ *and*": ["strong", "emphasis"],
    "a ********** b": [],
}
BLOCKS: dict[str, list[str]] = {
    "# a\n\nb\nc\n\n---": ["heading", "paragraph", "rule"],
    "```py\nx = 1\n\ny": ["code"],
    "~~~\n```\n~~~\nafter": ["code", "paragraph"],
    "- a\n- b\n  - c\n\n1. d": ["list", "list"],
    "- a\n\n\n- b\n\n\n  c\n\n\nd": ["list", "paragraph"],
    "> a\nb\n\nc": ["quote", "paragraph"],
    "| a | b |\n|:--|--:|\n| 1 | 2 |\ntext": ["table", "paragraph"],
    "a | b": ["paragraph"],
}
CODE_OF: dict[str, list[str]] = {
    "1. Create:\n\n   ```py\n   import os\n\n\n   def a():\n   ```\n2. Run.\n\nEnd": ["import os\n\n\ndef a():"],
    "```make\nall:\n\tcc a\tb\n```": ["all:\n\tcc a\tb"],
    "1. Makefile:\n   ```make\n   all:\n   \tcc\n   ```\n\n> ```\n> \tcc\n> ```": ["all:\n\tcc", "\tcc"],
    "- a\n\t- b\n\n\t\t```\n\t\tall:\n\t\t\tcc\n\t\t```\t\n\tc": ["all:\n\tcc"],
}
BOMBS: tuple[str, ...] = (
    "*a " * 60_000,
    "[" * 100_000,
    "`" * 99_999 + "a",
    "> " * 5_000 + "a",
    "- " * 5_000,
    "<" * 100_000,
    "_a" * 60_000,
    "|" * 20_000 + "\n" + "|-" * 10_000,
    "a|b\n-" + " " * 50_000 + "x",
    "![a](" * 20_000,
    "h" * 200_000,
    "~~" * 50_000,
    "  - a\n" * 10_000,
    "a" + "*" * 200_000,
    "a" + "~" * 200_000 + "b",
    ("[x](a" + " " * 1_990 + "b)") * 500,
    "[" * 50_000 + "](a)" * 50_000,
    "[" * 10_000 + "](https://a.example)" * 10_000,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen(browser: Browser) -> AsyncIterator[Opened]:
    async with serving(cluster_app(lambda: cluster_of("a", "b"))) as address, opened(browser, address) as page:
        yield page


async def test_markup_in_answers_stays_text(seen: Opened) -> None:
    """Shows every prefix of each answer, like a stream."""
    made = await seen.page.evaluate(SHOW, list(EVIL_ANSWERS))
    assert {*made["tags"]} <= {*TAGS.split()}, made["tags"]
    assert {*made["attributes"]} <= {*ATTRIBUTES.split()}, made["attributes"]
    assert all(address.startswith(("https://", "http://")) for address in made["addresses"]), made["addresses"]
    assert await seen.page.evaluate("window.pwned") is None
    seen.check()


async def test_names_and_messages_stay_text(browser: Browser) -> None:
    """Shows names of a model, workers and conversations, texts of a model and a user, a log and an error."""
    cluster = cluster_of(EVIL, "b")
    cluster["status"]["workers"][0]["heartbeat"]["last_error"] = EVIL
    cluster["status"].update(state="recovering", reason=EVIL, absent=[EVIL])
    engine = ScriptedEngine(says("<script>pwned=1</script>"))
    app = cluster_app(lambda: cluster, model_name=EVIL, engine=engine)
    async with serving(app) as address, opened(browser, address) as seen:
        page = seen.page
        await page.get_by_label("Message", exact=True).fill("<b onclick=1>")
        await page.keyboard.press("Enter")
        await page.locator(".message.assistant .text", has_text="<script>").wait_for()
        await page.get_by_role("link", name="Cluster").click()
        await page.locator(".picture svg").wait_for()
        await page.get_by_text("missing:").wait_for()
        assert await page.locator("main script, main b, main img").count() == 0
        assert await page.evaluate("window.pwned") is None
        seen.check()


async def test_markdown_is_read_as_written(seen: Opened) -> None:
    kinds = """async (texts) => {
      const { parseInline } = await import("/browser/text/inline.js");
      return texts.map((text) => parseInline(text).map(({ kind }) => kind).filter((kind) => kind !== "text"));
    }"""
    assert await seen.page.evaluate(kinds, [*TREES]) == [*TREES.values()]
    blocks = """async (texts) => {
      const { parseBlocks } = await import("/browser/text/blocks.js");
      return texts.map((text) => parseBlocks(text).map(({ kind }) => kind));
    }"""
    assert await seen.page.evaluate(blocks, [*BLOCKS]) == [*BLOCKS.values()]


async def test_code_keeps_its_lines_as_written(seen: Opened) -> None:
    code = """async (texts) => {
      const { parseBlocks } = await import("/browser/text/blocks.js");
      const inner = ({ kind, text, items = [], blocks = [] }) =>
        kind === "code" ? text : [...items.flat(), ...blocks].flatMap(inner);
      return texts.map((text) => parseBlocks(text).flatMap(inner));
    }"""
    assert await seen.page.evaluate(code, [*CODE_OF]) == [*CODE_OF.values()]


async def test_hostile_markdown_takes_bounded_time(seen: Opened) -> None:
    slowest = """async (texts) => {
      const { parseBlocks } = await import("/browser/text/blocks.js");
      const taken = (text) => {
        const begun = performance.now();
        parseBlocks(text);
        return performance.now() - begun;
      };
      return texts.map(taken);
    }"""
    times = await seen.page.evaluate(slowest, list(BOMBS))
    assert max(times) < 5000, times


async def test_unchanged_blocks_keep_their_elements(seen: Opened) -> None:
    same = """async () => {
      const { MarkdownView } = await import("/browser/text/markdown.js");
      const parent = document.createElement("div");
      const view = new MarkdownView(parent);
      view.show("first\\n\\nsec");
      const [first, second] = parent.children;
      view.show("first\\n\\nsecond");
      return [parent.children[0] === first, parent.children[1] === second, parent.textContent];
    }"""
    assert await seen.page.evaluate(same) == [True, False, "firstsecond"]


async def test_events_are_put_together_from_any_pieces(seen: Opened) -> None:
    parse = """async ([text, sizes]) => {
      const { EventParser } = await import("/browser/text/events.js");
      return sizes.map((size) => {
        const parser = new EventParser();
        const found = [];
        for (let at = 0; at < text.length; at += size) found.push(...parser.push(text.slice(at, at + size)));
        return found;
      });
    }"""
    text = ': waiting\n\nid: a:1\ndata: {"x": 1}\n\ndata:two\r\ndata: lines\r\n\r\nid: a:3\ndata: [DONE]\n\n'
    expected = [{"id": "a:1", "data": '{"x": 1}'}, {"id": "a:1", "data": "two\nlines"}, {"id": "a:3", "data": "[DONE]"}]
    assert await seen.page.evaluate(parse, [text, [1, 2, 3, 7, 1000]]) == [expected] * 5


async def test_the_policy_stops_what_the_page_would_miss(seen: Opened) -> None:
    refused = "(text) => { try { document.body.innerHTML = text; return false } catch { return true } }"
    assert await seen.page.evaluate(refused, EVIL)
    loaded = """() => new Promise((resolve) => {
      const image = new Image();
      image.onload = () => resolve("loaded");
      image.onerror = () => resolve("refused");
      image.src = "https://evil.example/x.png";
    })"""
    assert await seen.page.evaluate(loaded) == "refused"


CODE: dict[tuple[str, str], list[list[str]]] = {
    ("py", 'if x == "a#b":  # yes'): [["keyword", "if"], ["string", '"a#b"'], ["comment", "# yes"]],
    ("c", "int n = 0x1F; /* # // */ n++;"): [["keyword", "int"], ["number", "0x1F"], ["comment", "/* # // */"]],
    ("sql", "SELECT a -- b"): [["keyword", "SELECT"], ["comment", "-- b"]],
    ("js", "`a\n${b}` // c"): [["string", "`a\n${b}`"], ["comment", "// c"]],
    ("html", "<!-- if --> <p>"): [["comment", "<!-- if -->"]],
    ("py", '"""Return if not "x" for ""a.\n\n  It\'s."""\nreturn'): [
        ["string", '"""Return if not "x" for ""a.\n\n  It\'s."""'],
        ["keyword", "return"],
    ],
    ("python", "s = '''while \\''' \\n is''' or 1"): [
        ["string", "'''while \\''' \\n is'''"],
        ["keyword", "or"],
        ["number", "1"],
    ],
    ("kotlin", '"""if\nelse'): [["string", '"""if\nelse']],
    ("js", 'f("", "") || "if"'): [["string", '""'], ["string", '""'], ["string", '"if"']],
    ("rust", "let s = 'open"): [["keyword", "let"], ["string", "'open"]],
    ("text", "if x"): [],
    ("", "if x"): [],
}
HIGHLIGHT = """async ([language, code]) => {
  const { highlight } = await import("/browser/text/highlight.js");
  const parts = highlight(code, language);
  const coloured = parts.filter(({ kind }) => kind).map(({ kind, text }) => [kind, text]);
  return [parts.map(({ text }) => text).join(""), coloured];
}"""


async def test_code_is_coloured_and_stays_the_same_text(seen: Opened) -> None:
    for (language, code), expected in CODE.items():
        assert await seen.page.evaluate(HIGHLIGHT, [language, code]) == [code, expected]
