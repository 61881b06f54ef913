// A message on the page: its text, reasoning, calls of tools, probabilities, and what can be done with it.

import { copyButton } from "../copy_button.js";
import { button, element, fill, pressedKey } from "../dom.js";
import { MarkdownView } from "../text/markdown.js";
import { State } from "./conversation.js";
import { imageElements } from "./images.js";
import { probabilitiesView } from "./probabilities.js";

const NAMES = { user: "You", assistant: "Answer" };

/** Shows one message; `actions` are those of the chat: choose, edit, regenerate. */
export class MessageView {
  #message;
  #actions;
  #reasoning = new Part("Reasoning", "reasoning");
  #text = element("div", { class: "text" });
  #calls = element("div", { class: "calls" });
  #tokens = element("div");
  #name = element("h2");
  #foot = element("footer");
  #markdown = new MarkdownView(this.#text);
  #editButton = button("Edit", () => this.#edit());
  #seedButton = button("With seed…", () => this.#chooseSeed());

  constructor(message, versions, actions, settings) {
    this.#message = message;
    this.#actions = actions;
    this.settings = settings;
    this.versions = versions;
    const images = message.images?.length ? element("div", { class: "images" }, imageElements(message.images)) : null;
    const parts = [images, this.#reasoning.node, this.#text, this.#calls, this.#tokens, this.#foot];
    this.node = element("article", { class: `message ${message.role}`, "aria-label": NAMES[message.role] }, this.#name, parts);
    this.update();
  }

  /** Shows the message as it is now. */
  update() {
    const { role, content, reasoning = "", calls = [], tokens = [], state, waiting, model } = this.#message;
    const isStreaming = state === State.STREAMING;
    this.node.classList.toggle("streaming", isStreaming);
    this.#name.textContent = model ?? NAMES[role];
    if (role === "user") this.#text.textContent = content;
    else this.#markdown.show(content);
    this.#reasoning.show(this.settings.showsReasoning ? reasoning : "", isStreaming && !content);
    fill(this.#calls, calls.map(callElement));
    if (isStreaming) {
      fill(this.#foot, waiting ? element("p", { class: "note", role: "status" }, `Waiting: ${waiting}`) : null);
      return;
    }
    const shows = this.settings.showsProbabilities && tokens.length > 0;
    this.#text.hidden = shows;
    fill(this.#tokens, shows ? probabilitiesView(tokens) : null);
    fill(this.#foot, ...this.#footParts());
  }

  #footParts() {
    const { role, state, error } = this.#message;
    const failed = state === State.FAILED ? element("p", { class: "error", role: "alert" }, error) : null;
    const stopped = state === State.STOPPED ? element("span", { class: "note" }, "stopped") : null;
    const own = role === "user" ? this.#userActions() : this.#answerActions();
    return [failed, element("div", { class: "actions" }, this.#versionActions(), own, stopped, this.#figures())];
  }

  /** The versions of the message, in the same place. */
  #versionActions() {
    const { versions } = this;
    if (versions.length < 2) return [];
    const place = versions.indexOf(this.#message);
    const go = (by, label, symbol) =>
      button(label, () => this.#actions.choose(versions[place + by]), { symbol, disabled: !versions[place + by] });
    const count = element("span", { class: "note" }, `${place + 1}/${versions.length}`);
    return [go(-1, "Previous version", "‹"), count, go(1, "Next version", "›")];
  }

  #userActions() {
    return [this.#editButton];
  }

  #answerActions() {
    const copy = copyButton(() => this.#message.content);
    const again = button("Regenerate", () => this.#actions.regenerate(this.#message, -1));
    return [copy, again, this.#seedButton];
  }

  #figures() {
    const { finish, timings, usage, seed, role, unsent } = this.#message;
    if (role === "user") return [];
    const rate = timings?.decode_tok_s > 0 ? `${timings.decode_tok_s.toFixed(1)} tokens/s` : null;
    const notes = [
      finish === "length" ? "reached the limit of tokens" : null,
      unsent ? `without the first ${unsent} images of this chat, which are too many for a request` : null,
      usage ? `${usage.completion_tokens} tokens` : null,
      rate,
      seed === undefined ? null : `seed ${seed}`,
    ];
    return notes.filter((note) => note !== null).map((note) => element("span", { class: "note" }, note));
  }

  /** Closes the form that `opener` opened. */
  #close(opener) {
    this.update();
    opener.focus();
  }

  #edit() {
    const send = (event) => {
      event.preventDefault();
      if (field.value.trim() || this.#message.images?.length) this.#actions.edit(this.#message, field.value.trim());
    };
    const press = (event) => {
      const key = pressedKey(event);
      if (key === "Escape") this.#close(this.#editButton);
      else if (key === "Enter" && !event.shiftKey) send(event);
    };
    const field = element("textarea", { rows: "3", "aria-label": "Edit the message", keydown: press }, this.#message.content);
    const cancel = button("Cancel", () => this.#close(this.#editButton));
    const buttons = [element("button", { type: "submit", class: "primary" }, "Send"), cancel];
    fill(this.#text, element("form", { class: "edit", submit: send }, field, element("div", { class: "actions" }, buttons)));
    fill(this.#foot);
    field.focus();
  }

  #chooseSeed() {
    const usual = this.#message.seed ?? 0;
    const field = element("input", { type: "number", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, value: usual, required: true });
    const send = (event) => {
      event.preventDefault();
      this.#actions.regenerate(this.#message, field.valueAsNumber);
    };
    const go = element("button", { type: "submit", class: "primary" }, "Regenerate");
    const label = element("label", {}, "Seed ", field);
    const cancel = button("Cancel", () => this.#close(this.#seedButton));
    fill(this.#foot, element("form", { class: "actions", submit: send }, label, go, cancel));
    field.focus();
    field.select();
  }
}

/** A part that can be folded, hidden while it is empty. */
class Part {
  #wasOpen = null;
  #text = element("div", { class: "text" });
  #markdown = new MarkdownView(this.#text);

  constructor(title, kind) {
    this.node = element("details", { class: kind, hidden: true }, element("summary", {}, title), this.#text);
  }

  show(text, isOpen) {
    if (!text) return;
    if (this.node.hidden || this.#wasOpen !== isOpen) this.node.open = isOpen;
    this.#wasOpen = isOpen;
    this.node.hidden = false;
    this.#markdown.show(text);
  }
}

function callElement({ name, arguments: text }) {
  const summary = element("summary", {}, "Call of ", element("code", {}, name));
  return element("details", { class: "call", open: true }, summary, element("pre", { tabindex: "0" }, pretty(text)));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not complete yet
  }
}
