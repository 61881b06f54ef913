// The served models, and the one that this browser's chats use.

import { requestJson } from "./api.js";
import { browserTexts } from "./storage.js";

const KEY = "llamaclust.model";

/** Has the event "change" when the list or the chosen model differs from before. */
export class ServedModels extends EventTarget {
  #entries = [];

  /** Reads the list again; raises what `requestJson` raises. */
  async refresh(options) {
    const { data } = await requestJson("v1/models", options);
    const isSame = JSON.stringify(data) === JSON.stringify(this.#entries);
    this.#entries = data;
    if (!isSame) this.dispatchEvent(new Event("change"));
  }

  get names() {
    return this.#entries.map(({ id }) => id);
  }

  /** The entry of the chosen model, or of the first one if that is served no more; null before the first reading. */
  get chosen() {
    const name = browserTexts.get(KEY);
    return this.#entries.find(({ id }) => id === name) ?? this.#entries[0] ?? null;
  }

  /** The largest request with images to the chosen model, in bytes. 0: it reads text only. Infinity: not yet known. */
  get bodyBytes() {
    if (!this.chosen) return Infinity;
    return this.chosen.capabilities?.vision ? this.chosen.max_request_bytes : 0;
  }

  /** Fields of a request: the chosen model's sampling, and its name where there are several. A single one may be another
   *  after a restart. */
  get requestFields() {
    const { id, chat_sampling: sampling = {} } = this.chosen ?? {};
    return this.#entries.length > 1 ? { model: id, ...sampling } : sampling;
  }

  choose(name) {
    browserTexts.set(KEY, name);
    this.dispatchEvent(new Event("change"));
  }
}
