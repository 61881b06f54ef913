// The answers that run: begun, resumed after a reload of the page, stopped; each change is shown and saved.

import { addEvent } from "./answer.js";
import { State } from "./conversation.js";
import { endReply, streamReply } from "./reply.js";

const SAVE_MS = 1000; // at least between two saves
const PAUSE = 10; // times as long as a save took: each one writes the whole conversation

export class Answering {
  #running = new Map(); // {stopping, conversation} by the message's id
  #history;
  #onChange;
  #nextSave = 0; // in ms

  /** `onChange(conversation, message)` comes with each part of an answer, and with its end. */
  constructor(history, onChange) {
    this.#history = history;
    this.#onChange = onChange;
  }

  isRunning(message) {
    return this.#running.has(message.id);
  }

  /** A conversation with a running answer, which is newer than what the history has of it. */
  conversation(id) {
    return [...this.#running.values()].find(({ conversation }) => conversation.id === id)?.conversation;
  }

  /** Reads an answer to its end; `body` null: one that was begun before this page was loaded. */
  async run(conversation, message, body) {
    const stopping = new AbortController();
    this.#running.set(message.id, { stopping, conversation });
    const { replyId, lastEvent } = message;
    try {
      for await (const event of streamReply({ replyId, lastEvent, body, signal: stopping.signal })) {
        addEvent(message, event);
        this.#onChange(conversation, message);
        this.#saveSometimes(conversation);
      }
      if (message.state === State.STREAMING) message.state = State.DONE;
    } catch (error) {
      if (message.state !== State.DONE) fail(message, stopping.signal.aborted, error); // what is whole stays so without its end
    }
    message.waiting = undefined;
    this.#running.delete(message.id);
    await this.#history.update(conversation);
    this.#onChange(conversation, message);
  }

  /** Ends it here and on the server. */
  stop(message) {
    this.#running.get(message.id)?.stopping.abort();
    endReply(message.replyId).catch(() => {}); // the server ends what is not read for a while
  }

  /** Ends all answers of a conversation. */
  stopAll(conversationId) {
    for (const [id, { conversation }] of this.#running) {
      if (conversation.id === conversationId) this.stop(conversation.messages[id]);
    }
  }

  /** An answer goes on after a reload from its last event that was saved, however old that is. */
  async #saveSometimes(conversation) {
    const begun = performance.now();
    if (begun < this.#nextSave) return;
    this.#nextSave = Infinity;
    await this.#history.update(conversation);
    const ended = performance.now();
    this.#nextSave = ended + Math.max(SAVE_MS, PAUSE * (ended - begun));
  }
}

function fail(message, isStopped, error) {
  message.state = isStopped ? State.STOPPED : State.FAILED;
  if (!isStopped) message.error = error.message;
}
