// The API of the server that sent this page. The key goes in a header, and stays in this browser.

import { browserTexts, tabTexts } from "./storage.js";

const KEY = "llamaclust.key";
const SENDABLE = /^[\x21-\x7e]*$/;
const HEAD_MS = 20_000; // the server sends the head of each reply at once, but for those that say how long they take
export const ROOT = new URL("..", import.meta.url); // this file is in browser/

/** Has the event "change" for each change of the key. */
export const keyChanges = new EventTarget();

/** A reply that says what is wrong. */
export class ApiError extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** What went wrong, in words. */
export function reasonOf(error) {
  return error instanceof ApiError ? error.message : "the server is not reached";
}

/** Whether the key is kept for all tabs and later visits. */
export function isKeyKept() {
  return Boolean(browserTexts.get(KEY));
}

export function apiKey() {
  const key = tabTexts.get(KEY) ?? browserTexts.get(KEY) ?? "";
  return isSendable(key) ? key : "";
}

/** Whether a key fits a header. With another one, `fetch` fails like a network. */
export function isSendable(key) {
  return SENDABLE.test(key);
}

/** `isKept`: for all tabs of this browser, and not for this one alone. "" forgets the key. */
export function setApiKey(key, isKept) {
  for (const texts of [tabTexts, browserTexts]) texts.remove(KEY);
  if (key) (isKept ? browserTexts : tabTexts).set(KEY, key);
  keyChanges.dispatchEvent(new Event("change"));
}

addEventListener("storage", ({ key }) => {
  if (key === KEY) keyChanges.dispatchEvent(new Event("change")); // it was entered in another tab
});

/** `fetch` of a path, like "v1/models". Raises ApiError for a status that is no success, and TypeError, as where the network
 *  fails, if no head of a reply comes for `headMs`. */
export async function request(path, { headers = {}, signal = null, headMs = HEAD_MS, ...options } = {}) {
  const key = apiKey();
  const credentials = key ? { Authorization: `Bearer ${key}` } : {};
  const head = new AbortController();
  const timer = setTimeout(() => head.abort(new TypeError("no reply comes")), headMs);
  try {
    const reply = await fetch(new URL(path, ROOT), {
      ...options,
      signal: signal ? AbortSignal.any([signal, head.signal]) : head.signal,
      headers: { ...headers, ...credentials },
      credentials: "same-origin",
      cache: "no-store",
      redirect: "error",
    });
    if (!reply.ok) throw await errorOf(reply);
    return reply;
  } finally {
    clearTimeout(timer);
  }
}

export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

async function errorOf(reply) {
  if (reply.status === 401 && !apiKey()) return new ApiError(401, "this server needs an API key: use the button “API key”");
  const text = await reply.text();
  try {
    const { error } = JSON.parse(text);
    return new ApiError(reply.status, error.message ?? String(error), error.code ?? "");
  } catch {
    return new ApiError(reply.status, text.slice(0, 300) || `the server answered with status ${reply.status}`);
  }
}
