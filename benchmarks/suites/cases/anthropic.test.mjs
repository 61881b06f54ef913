// Anthropic's client for JavaScript.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Anthropic } from "@anthropic-ai/sdk";
import { api, model } from "./server.mjs";

const client = new Anthropic({ baseURL: api, apiKey: "none", maxRetries: 0 });
const asked = { model, messages: [{ role: "user", content: "Say hello." }], max_tokens: 8 };

test("messages", async () => {
  assert.ok((await client.messages.create(asked)).content[0].text);
});

test("a stream of messages", async () => {
  assert.ok((await client.messages.stream(asked).finalMessage()).content[0].text);
});

test("counted tokens", async () => {
  assert.ok((await client.messages.countTokens({ model, messages: asked.messages })).input_tokens > 0);
});

test("errors", async () => {
  await assert.rejects(client.messages.create({ ...asked, messages: [] }), Anthropic.BadRequestError);
});
