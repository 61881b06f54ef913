// The requests that ended last, the newest first. Rows stay, so that the focus stays on their buttons.

import { requestJson } from "../api.js";
import { button, element, fill } from "../dom.js";
import { milliseconds } from "./format.js";

const COLUMNS = ["request", "end", "prompt", "answer", "time", "actions"];
const MOST = 10;
const PERIOD_MS = 2000;
const DEADLINE_MS = 5000;

export class EndedCard {
  #rows = new Map(); // by what they show
  #body = element("tbody");
  #onWhy;
  #readAt = -PERIOD_MS;
  #areOfSeveral = false; // models

  /** `onWhy(id)` comes where its waterfall is wanted. */
  constructor(onWhy) {
    this.#onWhy = onWhy;
    const head = element("tr", {}, COLUMNS.map((title) => element("th", { scope: "col" }, title)));
    const table = element("table", { class: "wide" }, element("thead", {}, head), this.#body);
    const region = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Ended requests" }, table);
    this.node = element("section", { class: "card", hidden: true }, element("h2", {}, "Ended requests"), region);
  }

  /** Reads them, now and then. */
  async refresh() {
    if (performance.now() - this.#readAt < PERIOD_MS) return;
    this.#readAt = performance.now();
    try {
      const { requests } = await requestJson("cluster/requests", { signal: AbortSignal.timeout(DEADLINE_MS) });
      this.#areOfSeveral = new Set(requests.map(({ model }) => model)).size > 1;
      this.#show(requests.filter(({ end }) => end).slice(-MOST).reverse());
    } catch {
      // the view says that the server is not reached
    }
  }

  #show(requests) {
    const keys = requests.map((request) => JSON.stringify([request, this.#areOfSeveral]));
    if (keys.join() === [...this.#rows.keys()].join()) return;
    this.#rows = new Map(requests.map((request, index) => [keys[index], this.#rows.get(keys[index]) ?? this.#row(request)]));
    fill(this.#body, [...this.#rows.values()]);
    this.node.hidden = requests.length === 0;
  }

  #row({ id, model, end, seconds, prompt_tokens: prompt, cached_tokens: cached, generated_tokens: generated }) {
    const why = button("Time", () => this.#onWhy(id), { "aria-label": `Time of request ${id}` });
    const cells = [end, cached ? `${prompt} (${cached} cached)` : prompt, generated, milliseconds(1000 * seconds), element("div", { class: "actions" }, why)];
    const of = this.#areOfSeveral ? element("small", {}, ` ${model}`) : null;
    return element("tr", {}, element("th", { scope: "row", class: "mono" }, id, of), cells.map((cell) => element("td", {}, cell)));
  }
}
