// Conversations kept in this browser (IndexedDB); nothing of them is on a server. Several tabs may write the same one.

import { State, isFurther } from "./conversation.js";

const NAME = "llamaclust";
const STORE = "conversations";
const VERSION = 3;
const ENTRIES = "entries"; // an index of [updated, title]: conversations may be large, and are not read for a list
const RUNNING = "running"; // an index of the conversations with answers that have not ended

/** What the browser cannot keep, without a database or without room, lasts as long as the page. */
export class History {
  #database = null;
  #isReached = true;
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
    return this.#isReached && this.#unsaved.size === 0;
  }

  /** `{id, title, updated}` of each, the newest first. */
  async list() {
    const kept = (await this.#try("readonly", entriesOf)) ?? [];
    const unsaved = [...this.#unsaved.values()].map(({ id, title, updated }) => ({ id, title, updated }));
    const entries = [...new Map([...kept, ...unsaved].map((entry) => [entry.id, entry])).values()];
    return entries.sort((entry, other) => other.updated - entry.updated);
  }

  /** A conversation, undefined for none. */
  async load(id) {
    return this.#unsaved.get(id) ?? this.#try("readonly", (store) => done(store.get(id)));
  }

  /** The conversations with answers that had not ended when they were saved. */
  async running() {
    return (await this.#try("readonly", (store) => done(store.index(RUNNING).getAll()))) ?? [];
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
    await this.#try("readwrite", (store) => done(store.delete(id)));
  }

  /** Messages that another tab added meanwhile stay as chosen there, and its later name and the answers of which it has more;
   *  `conversation` gets the latter two as well. */
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
    if ((before?.namedAt ?? 0) > (conversation.namedAt ?? 0)) {
      const { title, isNamed, namedAt } = before;
      Object.assign(conversation, { title, isNamed, namedAt });
    }
    const chosen = { ...before?.chosen, ...conversation.chosen };
    const updated = Math.max(before?.updated ?? 0, conversation.updated);
    const isRunning = Object.values(messages).some(({ state }) => state === State.STREAMING);
    const running = isRunning ? 1 : undefined;
    store.put({ ...conversation, messages, chosen, updated, running }); // the index leaves out undefined
    await committed(store.transaction);
  }

  /** What `work` returns for the store; undefined without a database, as where it was closed or its data removed. */
  async #try(mode, work) {
    if (!this.#database) return undefined;
    try {
      return await work(this.#store(mode));
    } catch {
      this.#isReached = false;
      return undefined;
    }
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }
}

/** Rejected where another tab has an older version of the page. */
async function opened() {
  const opening = indexedDB.open(NAME, VERSION);
  const blocked = new Promise((_, reject) => opening.addEventListener("blocked", () => reject(new Error("blocked"))));
  opening.addEventListener("upgradeneeded", ({ oldVersion }) => {
    const { result: database, transaction } = opening;
    const store = oldVersion ? transaction.objectStore(STORE) : database.createObjectStore(STORE, { keyPath: "id" });
    if (oldVersion < 2) store.createIndex(ENTRIES, ["updated", "title"]);
    store.createIndex(RUNNING, RUNNING);
  });
  const database = await Promise.race([done(opening), blocked]);
  database.addEventListener("versionchange", () => database.close()); // lest this tab blocks a newer one
  return database;
}

function entriesOf(store) {
  const entries = [];
  const reading = store.index(ENTRIES).openKeyCursor();
  return new Promise((resolve, reject) => {
    reading.addEventListener("error", () => reject(reading.error));
    reading.addEventListener("success", () => {
      const cursor = reading.result;
      if (cursor === null) return resolve(entries);
      const [updated, title] = cursor.key;
      entries.push({ id: cursor.primaryKey, title, updated });
      cursor.continue();
    });
  });
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
