// Ollama's client for JavaScript.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Ollama } from "ollama";
import { api, model } from "./server.mjs";

const client = new Ollama({ host: api });
const messages = [{ role: "user", content: "Say hello." }];
const options = { num_predict: 8 };

test("chat", async () => {
  assert.ok((await client.chat({ model, messages, options })).message.content);
});

test("a stream of chat", async () => {
  let text = "";
  for await (const part of await client.chat({ model, messages, options, stream: true })) text += part.message.content;
  assert.ok(text);
});

test("generate", async () => {
  assert.ok((await client.generate({ model, prompt: "Once", options })).response);
});

test("lists", async () => {
  assert.ok((await client.list()).models.length > 0);
  assert.ok((await client.ps()).models.length > 0);
});

test("errors are text", async () => {
  await assert.rejects(client.show({ model: "no-such-model" }), (error) => !String(error).includes("[object"));
});
