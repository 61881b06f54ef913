// The requests that run or wait, with how far each is.

import { element, fill } from "../dom.js";
import { number } from "./format.js";

const COLUMNS = ["request", "phase", "prompt", "answer", "age", "tokens/s"];

export class RequestsCard {
  #body = element("tbody");
  #more = element("p", { class: "note" });

  constructor() {
    const head = element("tr", {}, COLUMNS.map((title) => element("th", { scope: "col" }, title)));
    const table = element("table", { class: "wide" }, element("thead", {}, head), this.#body);
    const region = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Requests" }, table);
    this.node = element("section", { class: "card" }, element("h2", {}, "Requests"), region, this.#more);
  }

  show({ status, sequences }) {
    const { running, waiting } = status.requests;
    this.node.hidden = sequences.length === 0;
    fill(this.#body, sequences.map(row));
    const rest = running + waiting - sequences.length;
    this.#more.textContent = rest > 0 ? `and ${rest} more` : "";
  }
}

function row({ id, phase, prompt_tokens: prompt, computed_tokens: computed, generated_tokens: generated, max_new_tokens: most, age_s: age }) {
  const label = `${computed} of ${prompt} prompt tokens are computed`;
  const progress = element("progress", { max: prompt, value: computed, "aria-label": label, title: label });
  const cells = [phase, [progress, ` ${prompt}`], `${generated} of ${most}`, `${number(age)} s`, generated ? number(generated / age) : ""];
  return element("tr", {}, element("th", { scope: "row", class: "mono" }, id), cells.map((cell) => element("td", {}, cell)));
}
