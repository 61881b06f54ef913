// The machines as a table, with what can be done with each. Its rows stay, so that the focus stays on their buttons.

import { reasonOf, request, requestJson } from "../api.js";
import { button, element, fill } from "../dom.js";
import { bytes, layers, milliseconds, number, percent } from "./format.js";

const DRAIN_MS = 630_000; // the reply comes once the layers are moved, within 600 s
const COLUMNS = ["machine", "state", "layers", "device", "version", "memory", "busy", "per token", "planned", "per prompt token", "planned", "tokens/s", "actions"];

export class WorkersTable {
  #rows = new Map();
  #body = element("tbody");
  #onError;

  constructor(onError) {
    this.#onError = onError;
    const head = element("tr", {}, COLUMNS.map((title) => element("th", { scope: "col" }, title)));
    const table = element("table", { class: "wide" }, element("thead", {}, head), this.#body);
    this.log = new LogDialog();
    this.node = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Machines" }, table);
  }

  show(workers) {
    const names = workers.map(({ name }) => name);
    const isSame = names.length === this.#rows.size && names.every((name) => this.#rows.has(name));
    if (!isSame) this.#build(names);
    for (const worker of workers) this.#rows.get(worker.name).update(worker);
  }

  #build(names) {
    this.#rows = new Map(names.map((name) => [name, this.#rows.get(name) ?? new WorkerRow(name, this.log, this.#onError)]));
    fill(this.#body, [...this.#rows.values()].map(({ node }) => node));
  }
}

class WorkerRow {
  #cells = Array.from({ length: COLUMNS.length - 2 }, () => element("td"));
  #drain;
  #isDrained = false;
  #isMoving = false;

  constructor(name, log, onError) {
    this.#drain = button("Drain", () => this.#move(name, onError));
    const actions = element("div", { class: "actions" }, this.#drain, button("Log", () => log.open(name), { "aria-label": `Log of ${name}` }));
    this.name = name;
    this.node = element("tr", {}, element("th", { scope: "row" }, name), this.#cells, element("td", {}, actions));
  }

  update(worker) {
    this.#isDrained = worker.drained;
    const label = this.#isMoving ? "Moving layers…" : worker.drained ? "Undrain" : "Drain";
    if (this.#drain.textContent !== label) this.#drain.textContent = label;
    this.#drain.setAttribute("aria-label", `${label} ${this.name}`);
    this.#drain.setAttribute("aria-disabled", this.#isMoving); // a disabled button would lose the focus
    const texts = [
      worker.condition,
      worker.idle_reason ? `not used: ${worker.idle_reason}` : layers(worker.layers, worker.share),
      worker.device ?? "",
      worker.version,
      bytes(worker.memory_bytes),
      percent(worker.busy),
      milliseconds(worker.decode_ms),
      milliseconds(worker.predicted_decode_ms ?? null),
      milliseconds(worker.prefill_ms ?? null),
      milliseconds(worker.predicted_prefill_ms ?? null),
      number(worker.tokens_per_s),
    ];
    texts.forEach((text, index) => (this.#cells[index].textContent = text));
    this.#cells[0].className = `condition ${worker.condition}`;
    this.node.title = worker.heartbeat?.last_error ?? "";
  }

  async #move(name, onError) {
    if (this.#isMoving) return;
    this.#isMoving = true;
    const verb = this.#isDrained ? "undrain" : "drain";
    try {
      await request(`cluster/workers/${encodeURIComponent(name)}/${verb}`, { method: "POST", headMs: DRAIN_MS });
    } catch (error) {
      onError(reasonOf(error));
    }
    this.#isMoving = false;
  }
}

/** The last lines of a worker's log. */
class LogDialog {
  #title = element("h2", { id: "log-title" });
  #text = element("pre", { class: "log", tabindex: "0" });
  #name = "";

  constructor() {
    const buttons = [button("Read again", () => this.#read()), button("Close", () => this.node.close(), { class: "primary" })];
    const parts = [this.#title, this.#text, element("div", { class: "actions" }, buttons)];
    this.node = element("dialog", { class: "panel log-panel", "aria-labelledby": "log-title" }, parts);
  }

  async open(name) {
    this.#name = name;
    this.#title.textContent = `Log of ${name}`;
    this.#text.textContent = "";
    this.node.showModal();
    await this.#read();
  }

  async #read() {
    const name = this.#name;
    const text = await logText(name);
    if (name !== this.#name) return; // another one was opened meanwhile
    this.#text.textContent = text;
    this.#text.scrollTop = this.#text.scrollHeight;
  }
}

async function logText(name) {
  try {
    const { before, lines } = await requestJson(`cluster/workers/${encodeURIComponent(name)}/log`);
    const earlier = before ? [`… ${before} earlier lines`] : [];
    return [...earlier, ...lines].join("\n") || "The log is empty.";
  } catch (error) {
    return reasonOf(error);
  }
}
