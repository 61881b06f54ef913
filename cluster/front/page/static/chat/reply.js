// One streamed answer that survives lost connections: the server keeps it, and sends what follows the last event.

import { ApiError, keyChanges, reasonOf, request } from "../api.js";
import { EventParser } from "../text/events.js";

const PAUSES_MS = [0, 250, 500, 1000, 2000, 5000]; // the last one again and again: the server says when it keeps the answer no more
const SILENT_MS = 20_000; // the server sends a comment at least every 15 s
const LARGE = 2 ** 16; // characters of a request whose upload may take longer than the head of a reply may
const UPLOAD_MS = 60_000; // the server waits 30 s for a request, and sends a head within 11 s more
const SHOWN_FROM = 2; // earlier losses are over too soon to be read
const RETRIED_CODES = new Set(["cluster_starting", "cluster_stopping", "server_busy"]);
const PROXY_STATUSES = new Set([502, 503, 504]);
const JSON_HEADERS = { "Content-Type": "application/json" };

/** Events as `{id, chunk}`; `{lost}` says why nothing comes, until the next event. `body` null: an answer that was begun before,
 *  of which `lastEvent` is the last event that the caller has. A refused key of an answer that was begun is waited out.
 *
 *  Raises ApiError where the server refuses or fails, DOMException AbortError where `signal` is aborted. */
export async function* streamReply({ replyId, lastEvent = "", body = null, signal }) {
  let position = lastEvent;
  let isSent = body === null;
  for (let failures = 0; ; failures++) {
    let lost = "the connection was closed";
    let isKeyRefused = false;
    try {
      const reply = isSent ? await resume(replyId, position, signal) : await begin(replyId, body, signal);
      isSent = true;
      for await (const event of eventsOf(reply)) {
        if (event.data === "[DONE]") return;
        failures = 0;
        position = event.id || position;
        yield { id: position, chunk: checked(JSON.parse(event.data)) };
      }
    } catch (error) {
      const isNew = isSent && body !== null && position === "" && error.code === "reply_not_found";
      isKeyRefused = isSent && error.status === 401;
      if (signal.aborted || !(isLost(error) || isNew || isKeyRefused)) throw error;
      if (isNew) isSent = false; // the server ended before it had kept anything
      lost = reasonOf(error);
    }
    if (failures >= SHOWN_FROM || isKeyRefused) yield { lost };
    if (isKeyRefused) await happens(keyChanges, "change", signal);
    else await pause(PAUSES_MS[Math.min(failures, PAUSES_MS.length - 1)], signal);
  }
}

/** Ends an answer on the server, also one that no connection reads. */
export async function endReply(replyId) {
  await request(`v1/streams/${encodeURIComponent(replyId)}`, { method: "DELETE" });
}

/** The same key again gives the same answer, so that a request whose reply was lost can be sent again. */
function begin(replyId, body, signal) {
  const headers = { ...JSON_HEADERS, "Idempotency-Key": replyId };
  const text = JSON.stringify(body);
  const headMs = text.length > LARGE ? UPLOAD_MS : undefined;
  return request("v1/chat/completions", { method: "POST", headers, body: text, signal, headMs });
}

function resume(replyId, lastEvent, signal) {
  const headers = lastEvent ? { "Last-Event-ID": lastEvent } : {};
  return request(`v1/streams/${encodeURIComponent(replyId)}`, { headers, signal });
}

async function* eventsOf(reply) {
  const parser = new EventParser();
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await read(reader); !part.done; part = await read(reader)) yield* parser.push(part.value);
  } finally {
    reader.cancel().catch(() => {}); // of a connection that is lost anyway
  }
}

/** The next part. TypeError, as where the network fails, where none comes for long: a machine without power closes nothing. */
function read(reader) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new TypeError("nothing comes")), SILENT_MS);
    reader.read().then(resolve, reject).finally(() => clearTimeout(timer));
  });
}

function checked(chunk) {
  if (chunk.error) throw new ApiError(500, chunk.error.message, chunk.error.code);
  return chunk;
}

/** Whether another attempt may succeed: the network, a server that starts, stops or is busy, a proxy that has none behind it. */
function isLost(error) {
  if (!(error instanceof ApiError)) return error instanceof TypeError;
  return error.code === "" ? PROXY_STATUSES.has(error.status) : RETRIED_CODES.has(error.code);
}

/** Ends at once where `signal` is aborted, with its reason. */
async function pause(milliseconds, signal) {
  const over = new EventTarget();
  const timer = setTimeout(() => over.dispatchEvent(new Event("end")), milliseconds);
  await happens(over, "end", signal).finally(() => clearTimeout(timer));
}

/** Waits for an event; ends at once where `signal` is aborted, with its reason. */
function happens(target, name, signal) {
  const listening = new AbortController();
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const options = { signal: listening.signal };
    target.addEventListener(name, resolve, options);
    signal.addEventListener("abort", () => reject(signal.reason), options);
  }).finally(() => listening.abort());
}
