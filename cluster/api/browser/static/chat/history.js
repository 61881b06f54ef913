// Conversations kept in this browser (IndexedDB); nothing of them is on a server.

const NAME = "llamaclust";
const STORE = "conversations";

/** What the browser cannot keep, without a database or without room, lasts as long as the page. */
export class History {
  #database = null;
  #unsaved = new Map();
  #removed = new Set(); // an answer that still runs does not bring its conversation back

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
    if (this.#removed.has(conversation.id)) return;
    try {
      await this.#put(conversation);
      this.#unsaved.delete(conversation.id);
    } catch {
      this.#unsaved.set(conversation.id, conversation);
    }
  }

  async remove(id) {
    this.#removed.add(id);
    this.#unsaved.delete(id);
    if (this.#database) await done(this.#store("readwrite").delete(id));
  }

  /** Messages that another tab added meanwhile stay. */
  async #put(conversation) {
    const store = this.#store("readwrite");
    const before = await done(store.get(conversation.id));
    store.put({ ...conversation, messages: { ...before?.messages, ...conversation.messages } });
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
