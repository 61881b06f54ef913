// Server-sent events, put together from the pieces in which they arrive.

/** Takes text in any pieces; gives `{id, data}` for each whole event. Comments are skipped. */
export class EventParser {
  #rest = "";
  #id = "";
  #data = [];

  *push(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    for (const line of lines) {
      const event = this.#line(line.endsWith("\r") ? line.slice(0, -1) : line);
      if (event !== null) yield event;
    }
  }

  #line(line) {
    if (line === "") return this.#end();
    const colon = line.indexOf(":");
    if (colon === 0) return null;
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    if (name === "id") this.#id = value;
    return null;
  }

  #end() {
    const event = this.#data.length ? { id: this.#id, data: this.#data.join("\n") } : null;
    this.#data = [];
    return event;
  }
}
