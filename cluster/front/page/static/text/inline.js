// Markdown within a line, as a tree of plain values: {kind, text | children, href}. Takes linear time.

const MARKS = [
  ["***", "strong-emphasis"],
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "deleted"],
  ["*", "emphasis"],
  ["_", "emphasis"],
];
const ESCAPABLE = /[\\`*_{}[\]()#+\-.!~|<>"'$&%,/:;=?@^]/;
const ADDRESS = /^https?:\/\/[^\s<>"'`]{1,2000}/i;
const DEPTH = 8;
const LONGEST_RUN = 8; // of marks; a longer one is text, taken at once
const SAFE = new Set(["http:", "https:", "mailto:"]);

/** The address of a link, null where following it could do more than open a page. */
export function safeAddress(text) {
  try {
    const address = new URL(text.trim());
    return SAFE.has(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

/** The parts of a text. */
export function parseInline(text, depth = 0) {
  return new InlineParser(text, depth).parse();
}

class InlineParser {
  #text;
  #at = 0;
  #depth;
  #parts = [];
  #plain = "";
  #last = ""; // character of it: a string that grows is not looked into, which would copy it each time
  #brackets = null;
  #places = new Map(); // of closing marks: the next one found, Infinity where none comes any more

  constructor(text, depth) {
    this.#text = text;
    this.#depth = depth;
  }

  parse() {
    while (this.#at < this.#text.length) {
      const found = this.#special(this.#text[this.#at]);
      if (!found) this.#append(this.#text[this.#at], this.#at + 1);
    }
    this.#flush();
    return this.#parts;
  }

  #special(character) {
    switch (character) {
      case "\\":
        return this.#escape();
      case "`":
        return this.#code();
      case "!":
      case "[":
        return this.#link();
      case "<":
        return this.#bracketed();
      case "h":
      case "H":
        return this.#bare();
      case "\n":
        return this.#newline();
      case "*":
      case "_":
      case "~":
        return this.#marked();
      default:
        return false;
    }
  }

  #escape() {
    const next = this.#text[this.#at + 1];
    if (next === undefined || !ESCAPABLE.test(next)) return false;
    this.#append(next, this.#at + 2);
    return true;
  }

  #newline() {
    this.#plain = this.#plain.trimEnd();
    this.#add({ kind: "break" }, this.#at + 1);
    return true;
  }

  #code() {
    const fence = /^`+/.exec(this.#text.slice(this.#at, this.#at + 64))[0];
    const start = this.#at + fence.length;
    const end = this.#closing(fence, start);
    if (end < 0) {
      this.#append(fence, start);
      return true;
    }
    const inner = this.#text.slice(start, end).replaceAll("\n", " ");
    const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "";
    this.#add({ kind: "code", text: padded ? inner.slice(1, -1) : inner }, end + fence.length);
    return true;
  }

  /** `[label](address "title")`, as written if the address is not safe; pictures become links to them, as nothing is loaded
   *  from other hosts. */
  #link() {
    const open = this.#at + (this.#text[this.#at] === "!" ? 1 : 0);
    if (this.#text[open] !== "[" || this.#depth >= DEPTH) return false;
    this.#brackets ??= bracketsOf(this.#text);
    const middle = this.#brackets.get(open);
    if (middle === undefined || this.#text[middle + 1] !== "(") return false;
    const end = this.#closing(")", middle + 2) < 0 ? -1 : addressEnd(this.#text, middle + 2);
    if (end < 0) return false;
    const given = this.#text.slice(middle + 2, end).trim().replace(/\s["'(][^"']{0,500}["')]$/, "").trimEnd();
    const href = safeAddress(given.replace(/^<|>$/g, ""));
    const label = this.#text.slice(open + 1, middle);
    if (href === null) this.#append(this.#text.slice(this.#at, end + 1), end + 1);
    else this.#add({ kind: "link", href, children: unlinked(this.#inner(label || given)) }, end + 1);
    return true;
  }

  #bracketed() {
    const end = this.#closing(">", this.#at);
    if (end < 0 || end - this.#at > 2000) return false;
    const inner = this.#text.slice(this.#at + 1, end);
    const href = /\s/.test(inner) ? null : safeAddress(inner);
    if (href === null) return false;
    this.#add({ kind: "link", href, children: [{ kind: "text", text: inner }] }, end + 1);
    return true;
  }

  #bare() {
    if (this.#followsWord()) return false;
    const found = ADDRESS.exec(this.#text.slice(this.#at, this.#at + 2100));
    if (found === null) return false;
    const shown = withoutEnd(found[0]);
    const href = safeAddress(shown);
    if (href === null) return false;
    this.#add({ kind: "link", href, children: [{ kind: "text", text: shown }] }, this.#at + shown.length);
    return true;
  }

  #marked() {
    const end = runEnd(this.#text, this.#at);
    if (end - this.#at > LONGEST_RUN) {
      this.#append(this.#text.slice(this.#at, end), end);
      return true;
    }
    for (const [mark, kind] of MARKS) {
      if (this.#text.startsWith(mark, this.#at) && this.#span(mark, kind)) return true;
    }
    return false;
  }

  #span(mark, kind) {
    const start = this.#at + mark.length;
    const after = this.#text[start];
    if (this.#depth >= DEPTH || after === undefined || /\s/.test(after)) return false;
    if (mark.includes("_") && this.#followsWord()) return false;
    const end = this.#spanEnd(mark, start);
    if (end <= start) return false;
    const children = this.#inner(this.#text.slice(start, end));
    const inside = kind === "strong-emphasis" ? [{ kind: "emphasis", children }] : children;
    this.#add({ kind: kind === "strong-emphasis" ? "strong" : kind, children: inside }, end + mark.length);
    return true;
  }

  /** Where a mark closes: not after a space, not within a longer run, and `_` not within a word. */
  #spanEnd(mark, start) {
    let tries = 0;
    let end = this.#closing(mark, start);
    while (end >= 0 && tries++ < 32) {
      const next = this.#text[end + mark.length];
      const isLonger = next === mark[0] && mark.length < 3;
      const isInWord = mark[0] === "_" && next !== undefined && /\w/.test(next);
      if (!isLonger && !isInWord && !/[\s\\]/.test(this.#text[end - 1])) return end;
      end = this.#text.indexOf(mark, isLonger ? runEnd(this.#text, end) : end + mark.length);
    }
    return -1;
  }

  /** Its next place, -1 where there is none; `from` only grows, so what was found is not searched for again. */
  #closing(mark, from) {
    let place = this.#places.get(mark) ?? -1;
    if (place < from) {
      place = this.#text.indexOf(mark, from);
      this.#places.set(mark, place < 0 ? Infinity : place);
    }
    return place === Infinity ? -1 : place;
  }

  #followsWord() {
    return /\w/.test(this.#last);
  }

  #inner(text) {
    return parseInline(text, this.#depth + 1);
  }

  #add(part, end) {
    this.#flush();
    this.#parts.push(part);
    this.#at = end;
  }

  #append(text, end) {
    this.#plain += text;
    this.#last = text.at(-1);
    this.#at = end;
  }

  #flush() {
    if (this.#plain) this.#parts.push({ kind: "text", text: this.#plain });
    this.#plain = "";
    this.#last = "";
  }
}

/** The place of each closing bracket, by that of the one that it closes. */
function bracketsOf(text) {
  const pairs = new Map();
  const open = [];
  for (let at = 0; at < text.length; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "`") at = codeEnd(text, at);
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]") pairs.set(open.pop(), at);
  }
  return pairs;
}

/** The place of the last backtick of a code span that begins at `at`, or of those at `at` if none closes them. */
function codeEnd(text, at) {
  const fence = /^`+/.exec(text.slice(at, at + 64))[0];
  const end = text.indexOf(fence, at + fence.length);
  return (end < 0 ? at : end) + fence.length - 1;
}

/** Parts of a link, which is not within another one. */
function unlinked(parts) {
  return parts.flatMap((part) => {
    if (!part.children) return part;
    const children = unlinked(part.children);
    return part.kind === "link" ? children : { ...part, children };
  });
}

/** A bare address without the punctuation of the sentence around it. */
function withoutEnd(address) {
  let end = address.length;
  for (; end > 0 && ".,;:!?)]*_~".includes(address[end - 1]); end--) {
    const inner = address.slice(0, end);
    if (inner.endsWith(")") && inner.split("(").length >= inner.split(")").length) break;
  }
  return address.slice(0, end);
}

function runEnd(text, from) {
  let end = from;
  while (text[end] === text[from]) end++;
  return end;
}

function addressEnd(text, from) {
  let open = 0;
  for (let at = from; at < text.length && at - from < 2000; at++) {
    if (text[at] === "\n") return -1;
    if (text[at] === "(") open++;
    if (text[at] === ")" && open-- === 0) return at;
  }
  return -1;
}
