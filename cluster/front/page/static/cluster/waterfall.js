// Where the time of a request went: its phases and their parts, as bars one below the other.

import { reasonOf, requestJson } from "../api.js";
import { button, element, fill, svg } from "../dom.js";
import { milliseconds, percent } from "./format.js";

const WIDTH = 240;
const LEAST = 0.005; // of a phase: smaller parts of it have no line
const STAGE_PARTS = [
  ["compute", "compute"],
  ["queue", "waiting for other requests"],
  ["send", "send"],
];

export class WaterfallDialog {
  #title = element("h2", { id: "waterfall-title" });
  #content = element("div", { class: "waterfalls", tabindex: "0", role: "region", "aria-label": "Waterfall" });
  #id = "";

  constructor() {
    const buttons = [button("Read again", () => this.#read()), button("Close", () => this.node.close(), { class: "primary" })];
    const parts = [this.#title, this.#content, element("div", { class: "actions" }, buttons)];
    this.node = element("dialog", { class: "panel waterfall-panel", "aria-labelledby": "waterfall-title" }, parts);
  }

  async open(id) {
    this.#id = id;
    this.#title.textContent = `Time of request ${id}`;
    fill(this.#content);
    this.node.showModal();
    await this.#read();
  }

  async #read() {
    const id = this.#id;
    const shown = await waterfalls(id);
    if (id === this.#id) fill(this.#content, shown); // another one may have been opened meanwhile
  }
}

async function waterfalls(id) {
  try {
    const { requests } = await requestJson(`cluster/requests/${encodeURIComponent(id)}`);
    return requests.map(waterfall);
  } catch (error) {
    return element("p", { class: "error", role: "alert" }, reasonOf(error));
  }
}

/** One of its sequences. */
function waterfall(request) {
  const { prompt_tokens: prompt, cached_tokens: cached, generated_tokens: generated, end, seconds, phases, adapters } = request;
  const found = cached ? ` (${cached} cached)` : "";
  const used = adapters.map(({ name, scale }) => `, adapter ${name} ${scale}`).join("");
  const head = `${prompt} prompt tokens${found}, ${generated} generated, ${end ?? "running"}, ${milliseconds(1000 * seconds)}${used}`;
  const lines = phases.flatMap((phase) => [phaseLine(phase, seconds), ...partLines(phase, seconds)]);
  return [element("p", {}, head), element("table", { class: "waterfall" }, element("tbody", {}, lines))];
}

function phaseLine(phase, whole) {
  const count = phase.microbatches ? `, ${phase.tokens} tokens in ${phase.microbatches} steps` : "";
  return line(`${phase.phase}${count}`, { kind: phase.phase, start: phase.start, seconds: phase.seconds, whole });
}

/** Those of a phase, drawn one after the other although they alternate. */
function partLines({ start, seconds, stages = [], links = 0, idle = 0 }, whole) {
  const parts = stages.flatMap((stage) => STAGE_PARTS.map(([kind, label]) => [kind, `${stage.worker}: ${label}`, stage[kind]]));
  parts.push(["links", "links and coordinator", links], ["idle", "idle between steps", idle]);
  const lines = [];
  let at = start;
  for (const [kind, label, taken] of parts) {
    if (taken > 0 && taken >= LEAST * seconds) lines.push(line(label, { kind: `part ${kind}`, start: at, seconds: taken, whole }));
    at += taken;
  }
  return lines;
}

function line(label, { kind, start, seconds, whole }) {
  const scale = WIDTH / Math.max(whole, 1e-9);
  const bar = svg("rect", { x: start * scale, y: 2, width: Math.max(1, seconds * scale), height: 10, rx: 1 });
  const drawing = svg("svg", { width: WIDTH, height: 14, "aria-hidden": "true" }, bar);
  const cells = [milliseconds(1000 * seconds), percent(whole ? seconds / whole : 0), drawing];
  return element("tr", { class: kind }, element("th", { scope: "row" }, label), cells.map((cell) => element("td", {}, cell)));
}
