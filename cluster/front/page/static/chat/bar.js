// The line above a chat: its list of chats on narrow screens, its name, its model, and files of it.

import { button, element, fill, pressedKey } from "../dom.js";
import { exportText } from "./export.js";

export class ChatBar {
  #models;
  #title = element("span", { class: "chat-title" });
  #model = element("select", { "aria-label": "Model", change: () => this.#models.choose(this.#model.value) });
  #renameButton = button("Rename", () => this.#rename(), { class: "quiet" });
  #conversation = null;
  #list = button("Chats", () => this.#actions.openList(), { class: "list-toggle" });
  #actions;

  /** `models`: ServedModels; `actions`: openList(), rename(title). */
  constructor(models, actions) {
    this.#models = models;
    this.#actions = actions;
    const saves = [
      button("Save as Markdown", () => this.#save("md", "text/markdown"), { class: "quiet", symbol: "↓ .md" }),
      button("Save for llamaclust chat", () => this.#save("json", "application/json"), { class: "quiet", symbol: "↓ .json" }),
    ];
    this.node = element("div", { class: "bar" }, this.#list, this.#title, this.#renameButton, saves, this.#model);
    models.addEventListener("change", () => this.#showModels());
    this.#showModels();
  }

  focusList() {
    this.#list.focus();
  }

  show(conversation) {
    this.#conversation = conversation;
    this.#title.textContent = conversation.title;
  }

  #showModels() {
    const { names, chosen } = this.#models;
    this.#model.hidden = names.length < 2;
    fill(this.#model, names.map((name) => element("option", { value: name, selected: name === chosen?.id }, name)));
  }

  #rename() {
    let isOpen = true; // leaving the field ends it, and so does taking it away
    const end = (title) => {
      if (!isOpen) return;
      isOpen = false;
      form.replaceWith(this.#title);
      if (title) this.#actions.rename(title);
    };
    const leave = (title) => {
      end(title);
      this.#renameButton.focus();
    };
    const field = element("input", {
      "aria-label": "Name of the chat",
      maxlength: "60",
      value: this.#conversation.title,
      blur: () => end(field.value.trim()),
      keydown: (event) => pressedKey(event) === "Escape" && leave(""),
    });
    const submit = (event) => {
      event.preventDefault();
      leave(field.value.trim());
    };
    const form = element("form", { class: "chat-title", submit }, field);
    this.#title.replaceWith(form);
    field.focus();
    field.select();
  }

  #save(ending, type) {
    const address = URL.createObjectURL(new Blob([exportText(this.#conversation, ending)], { type }));
    const name = this.#conversation.title.replace(/[^\p{L}\p{N} _-]+/gu, "").trim() || "chat";
    element("a", { href: address, download: `${name}.${ending}` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }
}
