// A conversation as a tree of messages: an edited or regenerated message stands beside the one that it replaces.
//
// A message: {id, parent, role, content, images, reasoning, calls, tokens, state, waiting, error, unsent, replyId, lastEvent,
// seed, model}.
// `state` of an answer: "streaming", "done", "stopped" or "failed". `tokens`: [text, logprob, [[text, logprob], ...],
// bytes]. `waiting`: why an answer pauses. `images` of a user's message: data URLs. `unsent`: the number of earlier images
// that the request of an answer did not have.

export const State = Object.freeze({ STREAMING: "streaming", DONE: "done", STOPPED: "stopped", FAILED: "failed" });

const TITLE = 60;
const OTHER_BYTES = 2 ** 16; // of the other fields of a request
const MOST_IMAGES = 64; // of a request
const PART_BYTES = 64; // of an image's part beside its URL
const ENDED = [State.STOPPED, State.DONE]; // one after the other, as a stopped answer may be read to its end elsewhere

/** 128 random bits as text: `crypto.randomUUID` is only there for https and this machine. */
export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A conversation that begins with a system prompt; "" for none. */
export function newConversation(system) {
  return { id: randomId(), title: "New chat", updated: Date.now(), messages: {}, chosen: {}, system };
}

/** Adds a message below another one (null: at the top), and chooses it. */
export function addMessage(conversation, parent, fields) {
  const message = { id: randomId(), parent, content: "", ...fields };
  conversation.messages[message.id] = message;
  choose(conversation, message);
  conversation.updated = Date.now();
  if (parent === null && message.role === "user" && !conversation.isNamed) conversation.title = titleOf(message.content);
  return message;
}

/** Gives a conversation a name that later messages leave as it is. */
export function rename(conversation, title) {
  Object.assign(conversation, { title, isNamed: true, namedAt: Date.now() });
}

/** The messages that are seen, from the top. */
export function chosenPath(conversation) {
  const path = [];
  for (let id = conversation.chosen[""]; id !== undefined; id = conversation.chosen[id]) {
    path.push(conversation.messages[id]);
  }
  return path;
}

/** Those in the same place, the oldest first. */
export function siblings(conversation, message) {
  return Object.values(conversation.messages).filter((other) => other.parent === message.parent);
}

export function choose(conversation, message) {
  conversation.chosen[message.parent ?? ""] = message.id;
}

/** Whether one version of a message has more of the answer than another: it ended, or has more text. */
export function isFurther(message, other) {
  const by = ENDED.indexOf(message.state) - ENDED.indexOf(other.state);
  return by > 0 || (by === 0 && length(message) > length(other));
}

function length({ content, reasoning = "" }) {
  return content.length + reasoning.length;
}

/** The messages above one, as the API wants them. Failed answers without text are left away. */
export function apiMessages(conversation, parent) {
  const messages = [];
  for (let id = parent; id !== null; id = conversation.messages[id].parent) messages.unshift(conversation.messages[id]);
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...messages.filter(isSent).map(apiMessage)];
}

/** The same with the latest images that fit into a request of `bodyBytes`: {messages, unsent}, with the number of the
 *  others. */
export function sentMessages(conversation, parent, bodyBytes) {
  const messages = apiMessages(conversation, parent);
  const images = messages.flatMap(({ content }) => (Array.isArray(content) ? content.filter(isImagePart) : []));
  const texts = messages.map((message) => ({ ...message, content: textOf(message) }));
  let free = bodyBytes - OTHER_BYTES - new Blob([JSON.stringify(texts)]).size;
  const latest = images.slice(-MOST_IMAGES).reverse();
  const first = latest.findIndex(({ image_url: { url } }) => (free -= url.length + PART_BYTES) < 0);
  const unsent = images.length - (first < 0 ? latest.length : first);
  const left = new Set(images.slice(0, unsent));
  return { messages: left.size ? messages.map((message) => withoutImages(message, left)) : messages, unsent };
}

function isImagePart({ type }) {
  return type === "image_url";
}

function textOf({ content }) {
  return Array.isArray(content) ? content.filter((part) => !isImagePart(part)) : content;
}

function withoutImages(message, images) {
  if (!Array.isArray(message.content)) return message;
  const content = message.content.filter((part) => !images.has(part));
  return { ...message, content: content.length ? content : "" };
}

function isSent(message) {
  return message.role === "user" || message.content !== "" || Boolean(message.calls?.length);
}

function apiMessage({ role, content, images = [], reasoning, calls }) {
  return {
    role,
    content: images.length ? [...images.map(imagePart), ...(content ? [{ type: "text", text: content }] : [])] : content,
    ...(reasoning ? { reasoning_content: reasoning } : {}),
    ...(calls?.length ? { tool_calls: calls.map(apiCall) } : {}),
  };
}

function imagePart(url) {
  return { type: "image_url", image_url: { url } };
}

function apiCall({ id, name, arguments: text }) {
  return { id, type: "function", function: { name, arguments: text } };
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > TITLE ? `${line.slice(0, TITLE)}…` : line || "New chat";
}
