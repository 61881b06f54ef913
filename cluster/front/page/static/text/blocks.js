// Markdown as blocks: a tree of plain values. An unfinished block at the end of a streamed text is read as if complete.

import { parseInline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]{0,200})$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ALIGNED = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/; // of a trimmed line, or it would take quadratic time
const DEPTH = 8;
const TAB = 4; // columns

/** The blocks of a text. Each has the `source` lines it was read from. */
export function parseBlocks(text, depth = 0) {
  const raw = text.replaceAll("\r\n", "\n").split("\n");
  const lines = raw.map((line) => line.replace(/^[ \t]+/, (indent) => indent.replaceAll("\t", " ".repeat(TAB))));
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at++;
      continue;
    }
    const [block, end] = readBlock(lines, raw, at, depth);
    blocks.push({ ...block, source: raw.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

/** `raw`: the lines before the tabs of their indents became spaces. */
function readBlock(lines, raw, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return readFence(lines, raw, at);
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, children: parseInline(unclosed(heading[2])) }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < DEPTH && ITEM.test(line)) return readList(lines, raw, at, depth);
  if (isTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

/** A heading without the marks that may close it. */
function unclosed(text) {
  let end = text.trimEnd().length;
  while (text[end - 1] === "#") end--;
  return end === 0 || text[end - 1] === " " ? text.slice(0, end).trimEnd() : text.trimEnd();
}

function readFence(lines, raw, at) {
  const [, fence, info] = FENCE.exec(lines[at]);
  const indent = lines[at].search(/\S/);
  const closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end++;
  const body = raw.slice(at + 1, end).map((line) => outdented(line, indent));
  const language = info.trim().split(/\s+/)[0].slice(0, 40);
  return [{ kind: "code", language, text: body.join("\n") }, Math.min(end + 1, lines.length)];
}

/** A line without so many columns of its indent. */
function outdented(line, width) {
  let at = 0;
  let column = 0;
  for (; column < width && /[ \t]/.test(line[at]); at++) column += line[at] === "\t" ? TAB : 1;
  return " ".repeat(Math.max(0, column - width)) + line.slice(at);
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && lines[end].trim() !== "" && (QUOTE.test(lines[end]) || !startsBlock(lines[end]))) end++;
  const inner = lines.slice(at, end).map((line) => QUOTE.exec(line)?.[1] ?? line);
  return [{ kind: "quote", blocks: parseBlocks(inner.join("\n"), depth + 1) }, end];
}

function readList(lines, raw, at, depth) {
  const isOrdered = (line) => /^\s*\d/.test(line);
  const ordered = isOrdered(lines[at]);
  const indent = ITEM.exec(lines[at])[1].length;
  const items = [];
  let isLoose = false;
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[1].length > indent + 1 || item[1].length < indent || isOrdered(lines[end]) !== ordered) break;
    if (RULE.test(lines[end])) break;
    const start = end;
    end = itemEnd(lines, start, indent);
    const width = item[1].length + item[2].length + 1;
    const rest = raw.slice(start + 1, end).map((line) => outdented(line, width));
    const text = [item[3] ?? "", ...rest].join("\n");
    isLoose ||= /\n\s*\n/.test(text.trimEnd());
    items.push(parseBlocks(text, depth + 1));
  }
  return [{ kind: "list", ordered, start: ordered ? Number.parseInt(lines[at], 10) : 1, isLoose, items }, end];
}

/** An item holds the lines that are indented deeper, and those that go on with its paragraph. */
function itemEnd(lines, at, indent) {
  let end = at + 1;
  while (end < lines.length) {
    let next = end;
    while (next < lines.length && lines[next].trim() === "") next++;
    const line = lines[next] ?? "";
    const depth = line.search(/\S/);
    if (next > end && depth <= indent) return ITEM.exec(line)?.[1].length === indent ? next : end;
    if (depth <= indent + 1 && startsBlock(line)) return next;
    end = next + 1;
  }
  return end;
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && ALIGNED.test(lines[at + 1].trim());
}

function readTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim() !== "") end++;
  const aligns = cells(lines[at + 1]).map((cell) => {
    const right = cell.endsWith(":");
    if (cell.startsWith(":")) return right ? "center" : "left";
    return right ? "right" : "";
  });
  const row = (line) => cells(line).slice(0, 64).map((cell) => parseInline(cell));
  return [{ kind: "table", aligns, head: row(lines[at]), rows: lines.slice(at + 2, end).map(row) }, end];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !startsBlock(lines[end]) && !isTable(lines, end)) end++;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [{ kind: "paragraph", children: depth > DEPTH ? [{ kind: "text", text }] : parseInline(text) }, end];
}

function startsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((start) => start.test(line));
}
