// The requests that run or wait, with how far each is. Rows stay, so that the focus stays on their buttons.

import { button, element, fill } from "../dom.js";
import { number } from "./format.js";

const COLUMNS = ["request", "phase", "prompt", "answer", "age", "tokens/s", "actions"];

export class RequestsCard {
  #rows = new Map();
  #body = element("tbody");
  #more = element("p", { class: "note" });
  #onWhy;

  /** `onWhy(id)` comes where its waterfall is wanted. */
  constructor(onWhy) {
    this.#onWhy = onWhy;
    const head = element("tr", {}, COLUMNS.map((title) => element("th", { scope: "col" }, title)));
    const table = element("table", { class: "wide" }, element("thead", {}, head), this.#body);
    const region = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Requests" }, table);
    this.node = element("section", { class: "card" }, element("h2", {}, "Requests"), region, this.#more);
  }

  show({ status, sequences }) {
    const { running, waiting } = status.requests;
    this.node.hidden = sequences.length === 0;
    this.#showRows(sequences);
    const rest = running + waiting - sequences.length;
    this.#more.textContent = rest > 0 ? `and ${rest} more` : "";
  }

  #showRows(sequences) {
    const before = [...this.#rows.values()];
    const rows = new Map();
    for (const sequence of sequences) {
      let key = sequence.id; // sequences of one request have the same
      while (rows.has(key)) key += "+";
      const row = this.#rows.get(key) ?? new RequestRow(sequence.id, this.#onWhy);
      row.update(sequence);
      rows.set(key, row);
    }
    this.#rows = rows;
    const now = [...rows.values()];
    if (now.length !== before.length || now.some((row, index) => row !== before[index])) fill(this.#body, now.map(({ node }) => node));
  }
}

class RequestRow {
  #cells = Array.from({ length: COLUMNS.length - 2 }, () => element("td"));
  #progress = element("progress");
  #prompt = element("span");

  constructor(id, onWhy) {
    const why = button("Time", () => onWhy(id), { "aria-label": `Time of request ${id}` });
    fill(this.#cells[1], this.#progress, " ", this.#prompt);
    this.node = element("tr", {}, element("th", { scope: "row", class: "mono" }, id), this.#cells, element("td", {}, element("div", { class: "actions" }, why)));
  }

  update({ phase, prompt_tokens: prompt, computed_tokens: computed, generated_tokens: generated, max_new_tokens: most, age_s: age }) {
    const label = `${computed} of ${prompt} prompt tokens are computed`;
    for (const [name, value] of Object.entries({ max: prompt, value: computed, "aria-label": label, title: label }))
      this.#progress.setAttribute(name, value);
    this.#prompt.textContent = prompt;
    const texts = [phase, null, `${generated} of ${most}`, `${number(age)} s`, generated ? number(generated / age) : ""];
    texts.forEach((text, index) => text !== null && (this.#cells[index].textContent = text));
  }
}
