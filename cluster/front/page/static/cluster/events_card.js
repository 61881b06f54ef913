// What happened in the cluster since the page was opened, the newest first.

import { element } from "../dom.js";

const MOST = 60;

export class EventsCard {
  #list = element("ol");

  constructor() {
    const log = element("div", { class: "events", role: "log", "aria-label": "Events", tabindex: "0" }, this.#list);
    this.node = element("section", { class: "card" }, element("h2", {}, "Events"), log);
    this.node.hidden = true;
  }

  add(lines) {
    if (!lines.length) return;
    this.node.hidden = false;
    const time = new Date().toLocaleTimeString([], { hour12: false });
    for (const line of lines) this.#list.prepend(element("li", {}, element("time", {}, time), line));
    while (this.#list.childElementCount > MOST) this.#list.lastChild.remove();
  }
}
