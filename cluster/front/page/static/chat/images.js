// Images of a message that is being written: picked, pasted or dropped, shown small, and sent as data URLs.

import { button, element, fill } from "../dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const SHARE = 11 / 16; // of the server's largest body: as base64 they fit it
const MOST = 64;

/** The images that stand above the field of a message, with the button that picks them. */
export class ChosenImages {
  #urls = [];
  #reading = null; // of the files that were added last
  #mostBytes = 0; // of one message
  #note = element("p", { class: "note", role: "status" });
  #shown = element("div", { class: "images" });
  #picker = element("input", { type: "file", accept: TYPES.join(","), multiple: true, hidden: true, change: () => this.#pick() });

  constructor() {
    this.node = element("div", { class: "chosen-images", hidden: true }, this.#shown, this.#note);
    this.button = button("Add images", () => this.#picker.click(), { symbol: "+", class: "quiet", hidden: true });
    this.picker = this.#picker;
  }

  /** The largest request with images, in bytes. 0: the chosen model reads text only. */
  set bodyBytes(value) {
    this.#mostBytes = Math.floor(value * SHARE);
    this.button.hidden = !value;
  }

  get count() {
    return this.#urls.length;
  }

  /** Takes the images of a paste; false if it has none, or text other than their names: it is then the browser's. */
  paste(transfer) {
    const images = [...transfer.files].filter(({ type }) => type.startsWith("image/"));
    const text = transfer.getData("text/plain").trim();
    if (images.length === 0 || (text && !images.some(({ name }) => name === text))) return false;
    this.add(images);
    return true;
  }

  /** Takes files, or says why not. */
  add(files) {
    const reading = this.#read(files, this.#reading).finally(() => {
      if (this.#reading === reading) this.#reading = null;
    });
    this.#reading = reading;
  }

  /** Waits until all files are read. Returns false if one of them was not taken meanwhile: the note says why. */
  async ready() {
    let areTaken = true;
    while (this.#reading) areTaken = (await this.#reading) && areTaken;
    return areTaken;
  }

  /** Returns the images and forgets them. */
  taken() {
    const urls = this.#urls;
    this.#urls = [];
    this.#say("");
    return urls;
  }

  #pick() {
    this.add([...this.#picker.files]);
    this.#picker.value = ""; // so that the same file can be picked again
  }

  async #read(files, before) {
    await before; // so that images stay in their order, and together within their bounds
    let reason = this.#refusal(files);
    if (!reason) {
      this.#say("Reading images…");
      try {
        this.#urls.push(...(await Promise.all(files.map(dataUrl))));
      } catch (error) {
        reason = error.message;
      }
    }
    this.#say(reason);
    return !reason;
  }

  #refusal(files) {
    if (!this.#mostBytes) return "This model reads text only.";
    if (this.#urls.length + files.length > MOST) return `A message has at most ${MOST} images.`;
    const other = files.find(({ type }) => !TYPES.includes(type));
    if (other) return `${other.name}: not a PNG, JPEG, WebP, GIF or BMP file.`;
    const chosen = this.#urls.reduce((sum, url) => sum + url.length * 0.75, 0);
    const total = files.reduce((sum, { size }) => sum + size, chosen);
    const most = (this.#mostBytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 });
    return total > this.#mostBytes ? `The images of a message have at most ${most} MiB.` : "";
  }

  #say(note) {
    this.#note.textContent = note;
    this.node.hidden = !note && this.#urls.length === 0;
    const remove = (url) => {
      this.#urls.splice(this.#urls.indexOf(url), 1);
      this.#say("");
    };
    fill(
      this.#shown,
      this.#urls.map((url, place) => {
        const label = `Remove image ${place + 1}`;
        return element("figure", {}, imageElement(url, place), button(label, () => remove(url), { symbol: "×" }));
      }),
    );
  }
}

/** Images of a message, for people. */
export function imageElements(urls) {
  return urls.map(imageElement);
}

function imageElement(url, place) {
  return element("img", { src: url, alt: `Image ${place + 1}` });
}

function dataUrl(file) {
  const reader = new FileReader();
  return new Promise((resolve, reject) => {
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${file.name}: cannot be read: ${reader.error.message}`)));
    reader.readAsDataURL(file);
  });
}
