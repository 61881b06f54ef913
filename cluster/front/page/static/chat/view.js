// The chat: the conversations of this browser, the one that is open, and its running answer.

import { element, fill, pressedKey } from "../dom.js";
import { Answering } from "./answering.js";
import { ChatBar } from "./bar.js";
import { Composer } from "./composer.js";
import { State, addMessage, choose, chosenPath, newConversation, randomId, rename, sentMessages, siblings } from "./conversation.js";
import { HistoryView } from "./history_view.js";
import { MessageView } from "./message_view.js";
import { loadSettings, requestBody } from "./settings.js";
import { settingsDialog } from "./settings_view.js";

const NEAR_END_PX = 80;
const ENDS = {
  [State.DONE]: "The answer is complete.",
  [State.STOPPED]: "The answer was stopped.",
  [State.FAILED]: "The answer failed.",
};
const KEPT = "The message was not sent: another chat was opened.";

export class ChatView {
  #history;
  #answering;
  #views = new Map(); // by the message's id
  #changed = new Set();
  #settings = loadSettings();
  #conversation = this.#fresh();
  #messages = element("div", { class: "messages" });
  #scroll = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Messages" }, this.#messages);
  #status = element("p", { class: "unseen", role: "status" });
  #list = new HistoryView({ open: (id) => this.#open(id), create: () => this.#create(), remove: (id) => this.#remove(id), close: () => this.#closeList() });
  #composer = new Composer({ send: (text, images) => this.#send(text, images), stop: () => this.#stop() });
  #models;
  #talk;
  #bar;
  #dialog;

  /** `history` keeps the conversations; `models`: ServedModels. */
  constructor(history, models) {
    this.#history = history;
    this.#models = models;
    this.#dialog = settingsDialog(this.#settings, models, () => this.#onSettings());
    this.#bar = new ChatBar(models, {
      openList: () => this.#openList(),
      rename: (title) => this.#rename(title),
    });
    this.#answering = new Answering(history, (conversation, message) => this.#onAnswer(conversation, message));
    const drop = ({ dataTransfer }) => this.#composer.drop(dataTransfer);
    const parts = [this.#bar.node, this.#scroll, this.#composer.node, this.#status];
    this.#talk = element("section", { class: "talk", "aria-label": "Chat", drop }, parts);
    models.addEventListener("change", () => this.#showModel());
    this.node = element("div", { class: "chat" }, this.#list.node, this.#talk, this.#dialog);
    this.node.addEventListener("click", ({ target }) => target === this.node && this.#closeList()); // beside the list
    matchMedia("(max-width: 760px)").addEventListener("change", () => this.#showsList(false)); // of style.css
    this.node.addEventListener("keydown", (event) => pressedKey(event) === "Escape" && this.#closeList());
  }

  /** Shows or hides the list on narrow screens. While it is shown, only the list takes clicks and keys. */
  #showsList(isShown) {
    this.node.classList.toggle("shows-list", isShown);
    this.#talk.inert = isShown;
  }

  #openList() {
    this.#showsList(true);
    this.#list.focus();
  }

  #closeList() {
    if (!this.#talk.inert) return;
    this.#showsList(false);
    this.#bar.focusList();
  }

  openSettings() {
    this.#dialog.showModal();
  }

  /** Opens the newest conversation, and goes on with answers that ran when the page was left. */
  async start() {
    const [newest] = await this.#history.list();
    this.#conversation = (newest && (await this.#history.load(newest.id))) ?? this.#fresh();
    await this.#show();
    this.#composer.focus();
    for (const conversation of await this.#history.running()) {
      if (conversation.id !== this.#conversation.id) this.#resume(conversation);
    }
  }

  #fresh() {
    return newConversation(this.#settings.system);
  }

  async #create() {
    this.#conversation = this.#fresh();
    await this.#show();
    this.#composer.focus();
  }

  async #open(id) {
    this.#conversation = this.#answering.conversation(id) ?? (await this.#history.load(id)) ?? this.#fresh();
    await this.#show();
    this.#composer.focus();
  }

  async #remove(id) {
    this.#answering.stopAll(id);
    await this.#history.remove(id);
    if (id === this.#conversation.id) this.#conversation = this.#fresh();
    await this.#show();
    this.#composer.focus();
  }

  async #rename(title) {
    rename(this.#conversation, title);
    await this.#history.save(this.#conversation);
    await this.#showList();
  }

  async #show() {
    if (this.#composer.keep()) this.#status.textContent = KEPT;
    this.#showsList(false);
    this.#resume(this.#conversation);
    this.#render();
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
    await this.#showList();
  }

  async #showList() {
    this.#bar.show(this.#conversation);
    this.#list.show(await this.#history.list(), this.#conversation.id, this.#history.isKept);
  }

  /** Answers of a conversation that no page reads. */
  #resume(conversation) {
    for (const message of Object.values(conversation.messages)) {
      const isLeft = message.state === State.STREAMING && !this.#answering.isRunning(message);
      if (isLeft) this.#answering.run(conversation, message, null);
    }
  }

  #showModel() {
    this.#composer.bodyBytes = this.#models.bodyBytes;
  }

  #send(text, images) {
    const last = chosenPath(this.#conversation).at(-1) ?? null;
    this.#sendBelow(last?.id ?? null, text, images);
  }

  #sendBelow(parent, content, images) {
    const fields = { role: "user", content, ...(images.length ? { images } : {}) };
    const question = addMessage(this.#conversation, parent, fields);
    this.#answer(question.id);
  }

  #answer(parent, seed = null) {
    const { messages, unsent } = sentMessages(this.#conversation, parent, this.#models.bodyBytes);
    const body = requestBody(this.#settings, messages, this.#models.requestFields, seed);
    const fields = { role: "assistant", state: State.STREAMING, replyId: randomId(), lastEvent: "", unsent };
    const message = addMessage(this.#conversation, parent, fields);
    const conversation = this.#conversation;
    this.#history.save(conversation).then(() => this.#showList());
    this.#answering.run(conversation, message, body);
    this.#status.textContent = "";
    this.#render();
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }

  /** A conversation without messages begins with the system prompt as it is now. */
  #onSettings() {
    if (chosenPath(this.#conversation).length === 0) this.#conversation.system = this.#settings.system;
    this.#render();
  }

  #running() {
    return chosenPath(this.#conversation).find((message) => this.#answering.isRunning(message));
  }

  #stop() {
    const message = this.#running();
    if (message) this.#answering.stop(message);
  }

  #render() {
    const actions = {
      choose: (message) => this.#choose(message),
      edit: (message, text) => this.#sendBelow(message.parent, text, message.images ?? []),
      regenerate: (message, seed) => this.#answer(message.parent, seed),
    };
    const path = chosenPath(this.#conversation);
    this.#views = new Map(
      path.map((message) => [message.id, new MessageView(message, siblings(this.#conversation, message), actions, this.#settings)]),
    );
    const hadFocus = this.#messages.contains(document.activeElement);
    fill(this.#messages, path.length ? [...this.#views.values()].map((view) => view.node) : welcome());
    if (hadFocus) this.#scroll.focus({ preventScroll: true }); // what had it is gone
    this.#composer.isRunning = this.#running() !== undefined;
  }

  #choose(message) {
    choose(this.#conversation, message);
    this.#history.save(this.#conversation);
    this.#render();
  }

  #onAnswer(conversation, message) {
    if (conversation.id !== this.#conversation.id) return;
    if (this.#changed.size === 0) requestAnimationFrame(() => this.#update());
    this.#changed.add(message);
  }

  /** Shows what came since the last frame. */
  #update() {
    const isAtEnd = this.#scroll.scrollHeight - this.#scroll.scrollTop - this.#scroll.clientHeight < NEAR_END_PX;
    for (const message of this.#changed) this.#views.get(message.id)?.update();
    const ended = [...this.#changed].find((message) => message.state !== State.STREAMING);
    if (ended) this.#status.textContent = ENDS[ended.state];
    this.#changed.clear();
    this.#composer.isRunning = this.#running() !== undefined;
    if (isAtEnd) this.#scroll.scrollTop = this.#scroll.scrollHeight;
  }
}

function welcome() {
  return element("p", { class: "empty" }, "Answers come from your own cluster. Chats are kept in this browser alone.");
}
