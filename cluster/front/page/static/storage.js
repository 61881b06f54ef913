// Small texts that this browser keeps; where it keeps none, as with cookies blocked, they last as long as the page.

class Texts {
  #unkept = new Map();
  #open;

  /** `open()` gives a Storage, or throws. */
  constructor(open) {
    this.#open = open;
  }

  /** null for none. */
  get(name) {
    try {
      return this.#unkept.get(name) ?? this.#open().getItem(name);
    } catch {
      return null;
    }
  }

  set(name, text) {
    try {
      this.#open().setItem(name, text);
      this.#unkept.delete(name);
    } catch {
      this.#unkept.set(name, text);
    }
  }

  remove(name) {
    this.#unkept.delete(name);
    try {
      this.#open().removeItem(name);
    } catch {
      // it was not kept
    }
  }
}

/** Of this tab. */
export const tabTexts = new Texts(() => sessionStorage);
/** Of all tabs. */
export const browserTexts = new Texts(() => localStorage);
