// Where messages are written: Enter sends, Shift+Enter begins a line; while an answer runs, the button stops it. Images are
// pasted or picked here.

import { element } from "../dom.js";
import { ChosenImages } from "./images.js";

const MOST_ROWS_PX = 240;

export class Composer {
  #field;
  #action;
  #images = new ChosenImages();
  #isRunning = false;
  #isWaiting = false; // for images of a message that is to be sent

  constructor({ send, stop }) {
    this.#field = element("textarea", {
      rows: "1",
      placeholder: "Message",
      "aria-label": "Message",
      input: () => this.#grow(),
      keydown: (event) => this.#key(event),
      paste: (event) => this.drop(event.clipboardData) && event.preventDefault(),
    });
    this.#action = element("button", { type: "submit", class: "primary" }, "Send");
    const submit = (event) => {
      event.preventDefault();
      if (this.#isRunning) stop();
      else this.#send();
    };
    const line = element("div", { class: "line" }, this.#images.button, this.#images.picker, this.#field, this.#action);
    this.node = element("form", { class: "composer", submit }, this.#images.node, line);
    this.send = send;
    this.stop = stop;
  }

  set isRunning(value) {
    this.#isRunning = value;
    this.#action.textContent = value ? "Stop" : "Send";
  }

  set readsImages(value) {
    this.#images.isAllowed = value;
  }

  focus() {
    this.#field.focus();
  }

  /** Takes the images of a paste or drop (DataTransfer); false if it has none. */
  drop(transfer) {
    return this.#images.take(transfer);
  }

  #key(event) {
    if (event.key === "Escape" && this.#isRunning) this.stop();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#isRunning) this.#send();
  }

  async #send() {
    if (this.#isWaiting) return;
    this.#isWaiting = true;
    const areReady = await this.#images.ready();
    this.#isWaiting = false;
    const text = this.#field.value.trim();
    if (!areReady || this.#isRunning || (!text && this.#images.count === 0)) return;
    this.#field.value = "";
    this.#grow();
    this.send(text, this.#images.taken());
  }

  #grow() {
    this.#field.style.height = "auto";
    this.#field.style.height = `${Math.min(MOST_ROWS_PX, this.#field.scrollHeight + 2)}px`;
  }
}
