// Where messages are written: Enter sends, Shift+Enter begins a line; while an answer runs, the button stops it. Images are
// pasted or picked here.

import { element, pressedKey } from "../dom.js";
import { ChosenImages } from "./images.js";

const MOST_ROWS_PX = 240;

export class Composer {
  #field;
  #action;
  #images = new ChosenImages();
  #isRunning = false;
  #waiting = null; // a message that is to be sent when its images are read

  constructor({ send, stop }) {
    this.#field = element("textarea", {
      rows: "1",
      placeholder: "Message",
      "aria-label": "Message",
      input: () => this.#grow(),
      keydown: (event) => this.#key(event),
      paste: (event) => this.#images.paste(event.clipboardData) && event.preventDefault(),
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

  /** The largest request with images, in bytes. 0: the chosen model reads text only. */
  set bodyBytes(value) {
    this.#images.bodyBytes = value;
  }

  /** Keeps a message that waits for its images here; false if none waits. */
  keep() {
    const isWaiting = this.#waiting !== null;
    this.#waiting = null;
    return isWaiting;
  }

  focus() {
    this.#field.focus();
  }

  /** Takes the files of a drop, or says why not. */
  drop({ files }) {
    if (files.length > 0) this.#images.add([...files]);
  }

  #key(event) {
    const key = pressedKey(event);
    if (key === "Escape" && this.#isRunning) this.stop();
    if (key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    if (!this.#isRunning) this.#send();
  }

  async #send() {
    if (this.#waiting) return;
    const waiting = (this.#waiting = {});
    const areReady = await this.#images.ready();
    if (this.#waiting !== waiting) return;
    this.#waiting = null;
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
