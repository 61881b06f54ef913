// The list of conversations.

import { button, element, fill } from "../dom.js";

export class HistoryView {
  #list = element("ul", { class: "conversations" });
  #note = element("p", { class: "note", hidden: true }, "This browser cannot keep chats: they end with the page.");
  #close;
  #actions;

  /** `actions`: open(id), create(), remove(id), close(), which narrow screens need. */
  constructor(actions) {
    this.#actions = actions;
    const create = button("New chat", () => actions.create(), { class: "primary" });
    this.#close = button("Close the list", () => actions.close(), { class: "list-toggle", symbol: "×" });
    const head = element("div", { class: "history-head" }, create, this.#close);
    this.node = element("nav", { class: "history", "aria-label": "Chats" }, head, this.#list, this.#note);
  }

  focus() {
    this.#close.focus();
  }

  show(conversations, openId, isKept) {
    this.#note.hidden = isKept;
    fill(this.#list, conversations.map((conversation) => this.#entry(conversation, openId)));
  }

  #entry({ id, title }, openId) {
    const open = button(title, () => this.#actions.open(id), { class: "title", "aria-current": id === openId ? "true" : null });
    return element("li", {}, open, removeButton(title, () => this.#actions.remove(id)));
  }
}

/** Removes with the second press: what is gone does not come back. */
function removeButton(title, remove) {
  let isConfirming = false;
  const confirm = (value) => {
    isConfirming = value;
    node.textContent = value ? "Delete?" : "×";
    node.setAttribute("aria-label", value ? `Really delete ${title}` : `Delete ${title}`);
  };
  const press = () => (isConfirming ? remove() : confirm(true));
  const node = button(`Delete ${title}`, press, { symbol: "×", class: "quiet", blur: () => confirm(false) });
  return node;
}
