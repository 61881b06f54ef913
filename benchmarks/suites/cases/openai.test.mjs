// OpenAI's client for JavaScript.
import assert from "node:assert/strict";
import { test } from "node:test";
import { OpenAI } from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { api, model } from "./server.mjs";

const client = new OpenAI({ baseURL: `${api}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const asked = { model, messages, max_tokens: 8 };
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 12 } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];

test("chat", async () => {
  const reply = await client.chat.completions.create(asked);
  assert.ok(reply.choices[0].message.content);
});

test("a stream of chat", async () => {
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.ok(text);
});

test("the stream helper", async () => {
  const stream = client.chat.completions.stream(asked);
  assert.ok((await stream.finalChatCompletion()).choices[0].message.content);
});

test("completions", async () => {
  assert.ok((await client.completions.create({ model, prompt: "Once", max_tokens: 4 })).choices[0].text);
});

test("a parsed reply", async () => {
  const format = zodResponseFormat(z.object({ name: z.string(), large: z.boolean() }), "city");
  const reply = await client.chat.completions.parse({ ...asked, max_tokens: 200, response_format: format });
  assert.equal(typeof reply.choices[0].message.parsed.name, "string");
});

test("tools", async () => {
  const reply = await client.chat.completions.create({ ...asked, max_tokens: 100, tools, tool_choice: "required" });
  assert.deepEqual(Object.keys(JSON.parse(reply.choices[0].message.tool_calls[0].function.arguments)), ["city"]);
});

test("a stream of tools", async () => {
  const stream = client.chat.completions.stream({ ...asked, max_tokens: 100, tools, tool_choice: "required" });
  const reply = await stream.finalChatCompletion();
  assert.ok(reply.choices[0].message.tool_calls.length > 0);
});

test("models", async () => {
  const names = [];
  for await (const entry of client.models.list()) names.push(entry.id);
  assert.ok(names.includes(model));
});

test("embeddings", async () => {
  assert.equal((await client.embeddings.create({ model, input: ["one", "two"] })).data.length, 2);
});

test("responses", async () => {
  assert.ok((await client.responses.create({ model, input: "Hello", max_output_tokens: 16 })).output_text);
});

test("a stream of responses", async () => {
  const stream = client.responses.stream({ model, input: "Hello", max_output_tokens: 400, temperature: 0 });
  assert.ok((await stream.finalResponse()).output_text);
});

test("errors", async () => {
  await assert.rejects(client.chat.completions.create({ ...asked, temperature: -1 }), OpenAI.BadRequestError);
});

test("a stream that is given up", async () => {
  const stream = await client.chat.completions.create({ ...asked, max_tokens: 200, stream: true });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
});
