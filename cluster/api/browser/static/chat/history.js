// Conversations kept in this browser (IndexedDB); nothing of them is on a server. Several tabs may write the same one.

import { State, isFurther } from "./conversation.js";

const NAME = "llamaclust";
const STORE = "conversations";

/** What the browser cannot keep, without a database or without room, lasts as long as the page. */
export class History {
  #database = null;
  #unsaved = new Map();

  static async open() {
    const history = new History();
    try {
      history.#database = await opened();
    } catch {
      // as in some private windows
    }
    return history;
  }

  /** Whether all conversations outlast the page. */
  get isKept() {
    return this.#unsaved.size === 0;
  }

  /** `{id, title, updated}` of each, the newest first. */
  async list() {
    const kept = this.#database ? await done(this.#store("readonly").getAll()) : [];
    const all = new Map([...kept, ...this.#unsaved.values()].map((conversation) => [conversation.id, conversation]));
    const entries = [...all.values()].map(({ id, title, updated }) => ({ id, title, updated }));
    return entries.sort((entry, other) => other.updated - entry.updated);
  }

  /** A conversation, undefined for none. */
  async load(id) {
    return this.#unsaved.get(id) ?? (this.#database ? done(this.#store("readonly").get(id)) : undefined);
  }

  async save(conversation) {
    try {
      await this.#put(conversation, true);
      this.#unsaved.delete(conversation.id);
    } catch {
      this.#unsaved.set(conversation.id, conversation);
    }
  }

  /** Saves what answers added, but no conversation that was removed meanwhile, here or in another tab. */
  async update(conversation) {
    if (this.#unsaved.has(conversation.id)) return this.save(conversation);
    try {
      await this.#put(conversation, false);
    } catch {
      if (this.#database) this.#unsaved.set(conversation.id, conversation);
    }
  }

  async remove(id) {
    this.#unsaved.delete(id);
    if (this.#database) await done(this.#store("readwrite").delete(id));
  }

  /** Messages that another tab added meanwhile stay, and answers of which it has more; `conversation` gets the latter too. */
  async #put(conversation, isNew) {
    const store = this.#store("readwrite");
    const before = await done(store.get(conversation.id));
    if (!before && !isNew) return;
    const messages = { ...before?.messages, ...conversation.messages };
    for (const [id, kept] of Object.entries(before?.messages ?? {})) {
      const own = conversation.messages[id];
      if (!own || !isFurther(kept, own)) continue;
      messages[id] = kept;
      if (own.state !== State.STREAMING) Object.assign(own, { error: undefined }, kept);
    }
    store.put({ ...conversation, messages });
    await committed(store.transaction);
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }
}

function opened() {
  const opening = indexedDB.open(NAME, 1);
  opening.addEventListener("upgradeneeded", () => opening.result.createObjectStore(STORE, { keyPath: "id" }));
  return done(opening);
}

function done(work) {
  return new Promise((resolve, reject) => {
    work.addEventListener("success", () => resolve(work.result));
    work.addEventListener("error", () => reject(work.error));
  });
}

function committed(transaction) {
  return new Promise((resolve, reject) => {
    transaction.addEventListener("complete", () => resolve());
    transaction.addEventListener("abort", () => reject(transaction.error));
  });
}
