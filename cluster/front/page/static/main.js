// The page: its two views, the state of the cluster in its head, and the API key.

import { ApiError, apiKey, keyChanges, requestJson } from "./api.js";
import { History } from "./chat/history.js";
import { ChatView } from "./chat/view.js";
import { ClusterView } from "./cluster/view.js";
import { button, element, fill } from "./dom.js";
import { keyDialog } from "./key_dialog.js";
import { ServedModels } from "./models.js";
import { applyTheme, toggleTheme } from "./theme.js";

const CHECK_MS = 5000;
const DEADLINE_MS = 5000;

class Page {
  #models = new ServedModels();
  #wasKeyRequested = false;
  #state = element("span", { class: "state", role: "status" }, "connecting");
  #main = element("main");
  #key = keyDialog();
  #keyButton = button("API key", () => this.#key.open(""), { class: "quiet", hidden: !apiKey() });
  #settings = button("Settings", () => this.views.chat.openSettings(), { class: "quiet" });
  #links = { chat: element("a", { href: "#chat" }, "Chat"), cluster: element("a", { href: "#cluster" }, "Cluster") };

  constructor(history) {
    this.views = { chat: new ChatView(history, this.#models), cluster: new ClusterView() };
    const tools = [
      this.#state,
      this.#settings,
      this.#keyButton,
      button("Dark or light", toggleTheme, { symbol: "◐", class: "quiet" }),
    ];
    const brand = element("h1", {}, element("img", { src: "browser/icon.svg", alt: "", width: 20, height: 20 }), "llamaclust");
    const views = element("nav", { class: "views", "aria-label": "Views" }, Object.values(this.#links));
    const head = element("header", { class: "head" }, brand, views, element("div", { class: "tools" }, tools));
    fill(this.#main, this.views.chat.node, this.views.cluster.node);
    document.body.append(head, this.#main, this.#key.node);
  }

  async start() {
    addEventListener("hashchange", () => this.#route());
    for (const name of ["dragover", "drop"]) addEventListener(name, keepPage);
    keyChanges.addEventListener("change", () => this.#onKey());
    this.#models.addEventListener("change", () => this.#check());
    this.#route();
    setInterval(() => this.#refresh(), CHECK_MS);
    await Promise.all([this.#refresh(), this.views.chat.start()]);
  }

  #route() {
    const shown = location.hash === "#cluster" ? "cluster" : "chat";
    for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close(); // a hidden one would block the page
    for (const [name, view] of Object.entries(this.views)) {
      view.node.hidden = name !== shown;
      if (name === shown) this.#links[name].setAttribute("aria-current", "page");
      else this.#links[name].removeAttribute("aria-current");
    }
    this.#settings.hidden = shown !== "chat";
    this.views.cluster.isShown = shown === "cluster";
    document.title = `llamaclust: ${shown}`;
  }

  #onKey() {
    this.#wasKeyRequested = false;
    this.#refresh();
  }

  async #refresh() {
    await this.#loadModels();
    await this.#check();
  }

  async #check() {
    const state = await health();
    const name = this.#models.chosen?.id;
    const text = name ? `${name}: ${state}` : state;
    if (this.#state.textContent === text) return; // what does not change is not read aloud again
    this.#state.textContent = text;
    this.#state.dataset.state = state;
  }

  /** Each time, as a restart may serve other models. The list stays as it was while the server does not answer, or refuses
   *  the key, which is then requested once. */
  async #loadModels() {
    const key = apiKey();
    try {
      await this.#models.refresh({ signal: AbortSignal.timeout(DEADLINE_MS) });
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) return;
      this.#keyButton.hidden = false;
      if (this.#wasKeyRequested || apiKey() !== key) return; // another one was entered meanwhile
      this.#wasKeyRequested = true;
      this.#key.open(apiKey() ? error.message : "");
    }
  }
}

/** A dropped file does not replace the page. */
function keepPage(event) {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
}

async function health() {
  try {
    const { status } = await requestJson("health", { signal: AbortSignal.timeout(DEADLINE_MS) });
    return status === "ok" ? "ready" : status;
  } catch (error) {
    return error instanceof ApiError ? error.code.replace(/^cluster_/, "") || "not ready" : "not reached";
  }
}

applyTheme();
await new Page(await History.open()).start();
