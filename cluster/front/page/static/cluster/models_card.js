// The models of a cluster, where there are several: their states, and which one the figures are of.

import { button, element, fill } from "../dom.js";

export class ModelsCard {
  #buttons = new Map();
  #list = element("div", { class: "actions", role: "group", "aria-label": "Models" });
  #onChoice;

  /** `onChoice(name)` comes where another model is wanted. */
  constructor(onChoice) {
    this.#onChoice = onChoice;
    this.node = element("section", { class: "card", hidden: true }, element("h2", {}, "Models"), this.#list);
  }

  show({ model, models = [] }) {
    this.node.hidden = models.length < 2;
    const names = models.map(({ name }) => name);
    if (String(names) !== String([...this.#buttons.keys()])) {
      this.#buttons = new Map(names.map((name) => [name, button(name, () => this.#onChoice(name))]));
      fill(this.#list, [...this.#buttons.values()]);
    }
    for (const { name, state, requests } of models) {
      const node = this.#buttons.get(name);
      node.textContent = `${name}: ${state}${requestsText(requests)}`;
      node.setAttribute("aria-pressed", String(name === model));
    }
  }
}

function requestsText({ running, waiting }) {
  const counts = [[running, "running"], [waiting, "waiting"]].filter(([count]) => count);
  return counts.length ? ` (${counts.map((pair) => pair.join(" ")).join(", ")})` : "";
}
