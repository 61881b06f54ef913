// The cluster now: read again and again while it is seen.

import { reasonOf, requestJson } from "../api.js";
import { element, fill } from "../dom.js";
import { changes } from "./changes.js";
import { EndedCard } from "./ended_card.js";
import { EventsCard } from "./events_card.js";
import { FiguresCard } from "./figures.js";
import { ModelsCard } from "./models_card.js";
import { Picture } from "./picture.js";
import { RequestsCard } from "./requests_card.js";
import { viewState } from "./state.js";
import { WaterfallDialog } from "./waterfall.js";
import { WorkersTable } from "./workers.js";

const PERIOD_MS = 500;
const DEADLINE_MS = 5000;
const RATE_MS = 1500; // rates are means over at least so long

export class ClusterView {
  #samples = []; // the newest, for rates
  #last = null;
  #model = null; // whose figures are shown; null: the first one
  #isShown = false;
  #isReading = false;
  #error = "";
  #noted = "";
  #notices = element("div", { role: "status" });
  #drawing = element("div", { class: "picture", tabindex: "0", role: "region", "aria-label": "Picture of the cluster" });
  #picture = new Picture(this.#drawing);
  #models = new ModelsCard((name) => this.#choose(name));
  #figures = new FiguresCard();
  #events = new EventsCard();
  #waterfall = new WaterfallDialog();
  #requests = new RequestsCard((id) => this.#waterfall.open(id));
  #ended = new EndedCard((id) => this.#waterfall.open(id));
  #workers = new WorkersTable((message) => this.#fail(message));

  constructor() {
    const legend = ["weights", "kv", "workspace", "busy"].map((name) => element("span", { class: name }, name === "kv" ? "KV" : name));
    const pictured = element("section", { class: "card", "aria-label": "Picture" }, this.#drawing, element("div", { class: "legend" }, legend));
    const machines = element("section", { class: "card" }, element("h2", {}, "Machines"), this.#workers.node);
    const cards = [this.#models.node, this.#figures.node, pictured, machines, this.#requests.node, this.#ended.node, this.#events.node];
    this.node = element("div", { class: "cluster" }, this.#notices, cards, this.#workers.log.node, this.#waterfall.node);
    setInterval(() => this.#read(), PERIOD_MS);
  }

  set isShown(value) {
    this.#isShown = value;
    if (value) this.#read();
  }

  /** What happened to one model is no event of another one. */
  #choose(name) {
    [this.#model, this.#last, this.#samples] = [name, null, []];
    this.#read();
  }

  async #read() {
    if (!this.#isShown || this.#isReading || document.hidden) return;
    this.#isReading = true;
    const model = this.#model;
    const cluster = await this.#cluster(model);
    this.#isReading = false;
    if (model !== this.#model) return void this.#read(); // another one was chosen meanwhile
    if (cluster) this.#show({ at: performance.now(), cluster });
    if (cluster) this.#ended.refresh();
  }

  /** Its state, null where there is none to be had. */
  async #cluster(model) {
    const path = model === null ? "cluster" : `cluster?model=${encodeURIComponent(model)}`;
    try {
      return await requestJson(path, { signal: AbortSignal.timeout(DEADLINE_MS) });
    } catch (error) {
      if (error.status === 404) this.#model = null; // a cluster of other models was started
      this.#note([{ isBad: true, text: `no state of the cluster: ${reasonOf(error)}` }]);
      return null;
    }
  }

  #show(sample) {
    this.#samples = this.#samples.filter(({ at }) => sample.at - at < 4 * RATE_MS);
    const before = this.#samples.findLast(({ at }) => sample.at - at >= RATE_MS) ?? this.#samples[0] ?? null;
    this.#events.add(changes(this.#last, sample.cluster));
    this.#samples.push(sample);
    this.#last = sample.cluster;
    const state = viewState(sample, before);
    this.#models.show(state.status);
    this.#picture.show(state);
    this.#figures.show(state);
    this.#requests.show(state);
    this.#workers.show(state.workers);
    this.#note(state.notices);
  }

  #fail(message) {
    this.#error = message;
    setTimeout(() => (this.#error = ""), 10000);
  }

  /** Replaced only where they change: they are read aloud. */
  #note(notices) {
    const all = this.#error ? [...notices, { isBad: true, text: this.#error }] : notices;
    const text = JSON.stringify(all);
    if (text === this.#noted) return;
    this.#noted = text;
    fill(this.#notices, all.map(({ isBad, text: shown }) => element("p", { class: isBad ? "notice bad" : "notice" }, shown)));
  }
}
