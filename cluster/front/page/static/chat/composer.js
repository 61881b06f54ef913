// Where messages are written: Enter sends, Shift+Enter begins a line; while an answer runs, the button stops it.

import { element } from "../dom.js";

const MOST_ROWS_PX = 240;

export class Composer {
  #field;
  #action;
  #isRunning = false;

  constructor({ send, stop }) {
    this.#field = element("textarea", {
      rows: "1",
      placeholder: "Message",
      "aria-label": "Message",
      input: () => this.#grow(),
      keydown: (event) => this.#key(event),
    });
    this.#action = element("button", { type: "submit", class: "primary" }, "Send");
    const submit = (event) => {
      event.preventDefault();
      if (this.#isRunning) stop();
      else this.#send();
    };
    this.node = element("form", { class: "composer", submit }, this.#field, this.#action);
    this.send = send;
    this.stop = stop;
  }

  set isRunning(value) {
    this.#isRunning = value;
    this.#action.textContent = value ? "Stop" : "Send";
  }

  focus() {
    this.#field.focus();
  }

  #key(event) {
    if (event.key === "Escape" && this.#isRunning) this.stop();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#isRunning) this.#send();
  }

  #send() {
    const text = this.#field.value.trim();
    if (!text) return;
    this.#field.value = "";
    this.#grow();
    this.send(text);
  }

  #grow() {
    this.#field.style.height = "auto";
    this.#field.style.height = `${Math.min(MOST_ROWS_PX, this.#field.scrollHeight + 2)}px`;
  }
}
