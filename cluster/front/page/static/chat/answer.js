// What the chunks of a stream add to the message of an answer.

import { State } from "./conversation.js";

/** Adds an event of `streamReply`. */
export function addEvent(message, { id, chunk, lost }) {
  message.waiting = lost;
  if (chunk) addChunk(message, id, chunk);
}

function addChunk(message, id, chunk) {
  message.lastEvent = id;
  message.seed = chunk.seed ?? message.seed;
  message.model = chunk.model ?? message.model;
  if (chunk.usage) message.usage = chunk.usage;
  for (const choice of chunk.choices ?? []) addChoice(message, choice);
}

function addChoice(message, { delta = {}, logprobs, finish_reason: reason, timings }) {
  message.content += delta.content ?? "";
  if (delta.reasoning_content) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
  for (const call of delta.tool_calls ?? []) addCall(message, call);
  for (const row of logprobs?.content ?? []) (message.tokens ??= []).push(compact(row));
  if (timings) message.timings = timings;
  if (reason) {
    message.state = State.DONE;
    message.finish = reason;
  }
}

function addCall(message, { index, id, function: part = {} }) {
  const calls = (message.calls ??= []);
  const call = (calls[index] ??= { id: "", name: "", arguments: "" });
  if (id) call.id = id;
  if (part.name) call.name = part.name;
  call.arguments += part.arguments ?? "";
}

function compact({ token, logprob, bytes, top_logprobs: top = [] }) {
  return [token, logprob, top.map((other) => [other.token, other.logprob]), bytes];
}
