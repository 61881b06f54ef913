// Markdown on the page: elements made from its tree. Markup within the text stays text.

import { copyButton } from "../copy_button.js";
import { element } from "../dom.js";
import { parseBlocks } from "./blocks.js";
import { highlight } from "./highlight.js";

const INLINE = { strong: "strong", emphasis: "em", deleted: "del" };

/** Shows a text that grows; blocks that did not change keep their elements, and so a selection within them. */
export class MarkdownView {
  #shown = []; // {source, node}

  constructor(parent) {
    this.parent = parent;
  }

  show(text) {
    const blocks = parseBlocks(text);
    const same = blocks.findIndex((block, index) => block.source !== this.#shown[index]?.source);
    const kept = same < 0 ? blocks.length : same;
    for (const { node } of this.#shown.splice(kept)) node.remove();
    for (const block of blocks.slice(kept)) {
      const node = blockElement(block);
      this.#shown.push({ source: block.source, node });
      this.parent.append(node);
    }
  }
}

/** The element of a block. */
export function blockElement(block) {
  switch (block.kind) {
    case "code":
      return codeElement(block);
    case "heading":
      return element(`h${Math.min(6, block.level + 2)}`, {}, inlineElements(block.children));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, block.blocks.map(blockElement));
    case "list":
      return listElement(block);
    case "table":
      return tableElement(block);
    default:
      return element("p", {}, inlineElements(block.children));
  }
}

function inlineElements(parts) {
  return parts.map((part) => {
    if (part.kind === "text") return part.text;
    if (part.kind === "break") return element("br");
    if (part.kind === "code") return element("code", {}, part.text);
    const children = inlineElements(part.children);
    if (part.kind !== "link") return element(INLINE[part.kind], {}, children);
    return element("a", { href: part.href, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
  });
}

function codeElement({ language, text }) {
  const label = language ? `code, ${language}` : "code";
  return element(
    "figure",
    { class: "code" },
    element("figcaption", {}, element("span", {}, language || "text"), copyButton(() => text)),
    element("pre", { tabindex: "0", role: "region", "aria-label": label }, element("code", {}, coloured(text, language))),
  );
}

function coloured(text, language) {
  return highlight(text, language).map((part) => (part.kind ? element("span", { class: `code-${part.kind}` }, part.text) : part.text));
}

function listElement({ ordered, start, isLoose, items }) {
  const tag = ordered ? "ol" : "ul";
  const entries = items.map((blocks) => {
    const tight = !isLoose && blocks[0]?.kind === "paragraph";
    const first = tight ? inlineElements(blocks[0].children) : [];
    return element("li", {}, first, blocks.slice(tight ? 1 : 0).map(blockElement));
  });
  return element(tag, ordered && start !== 1 ? { start } : {}, entries);
}

function tableElement({ aligns, head, rows }) {
  const row = (tag, parts) =>
    element(
      "tr",
      {},
      parts.map((part, column) =>
        element(tag, { class: aligns[column] ? `align-${aligns[column]}` : null }, inlineElements(part)),
      ),
    );
  const table = element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, rows.map((parts) => row("td", parts))));
  return element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "table" }, table);
}
