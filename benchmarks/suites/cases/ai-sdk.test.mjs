// Vercel's AI SDK, with its provider for OpenAI-compatible servers and the one for OpenAI.
import assert from "node:assert/strict";
import { test } from "node:test";
import { embed, generateObject, generateText, streamText, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { z } from "zod";
import { api, model } from "./server.mjs";

const options = { name: "llamaclust", baseURL: `${api}/v1`, apiKey: "none", supportsStructuredOutputs: true };
const provider = createOpenAICompatible(options);
const prompt = "Say hello.";
const schema = z.object({ name: z.string(), large: z.boolean() });
const asked = { model: provider(model), prompt, maxOutputTokens: 8, maxRetries: 0 };

test("text", async () => {
  const reply = await generateText(asked);
  assert.ok(reply.text && reply.usage.outputTokens > 0);
});

test("a stream of text", async () => {
  let text = "";
  for await (const part of streamText(asked).textStream) text += part;
  assert.ok(text);
});

test("an object", async () => {
  const reply = await generateObject({ ...asked, maxOutputTokens: 200, schema });
  assert.equal(typeof reply.object.name, "string");
});

test("an object without a schema of the server", async () => {
  const plain = createOpenAICompatible({ ...options, supportsStructuredOutputs: false });
  await assert.rejects(
    generateObject({ ...asked, model: plain(model), maxOutputTokens: 2, schema }),
    (error) => error.name === "AI_NoObjectGeneratedError",
  );
});

test("tools", async () => {
  const inputSchema = z.object({ city: z.string().max(12) });
  const tools = { get_weather: tool({ description: "The weather", inputSchema, execute: async () => "sunny" }) };
  const reply = await generateText({ ...asked, maxOutputTokens: 100, tools, toolChoice: "required" });
  assert.equal(reply.toolCalls[0].toolName, "get_weather");
});

test("completions", async () => {
  const reply = await generateText({ ...asked, model: provider.completionModel(model) });
  assert.ok(reply.text);
});

test("embeddings", async () => {
  const made = provider.embeddingModel ?? provider.textEmbeddingModel;
  assert.ok((await embed({ model: made(model), value: "one", maxRetries: 0 })).embedding.length > 0);
});

test("the provider for OpenAI, which uses responses", async () => {
  const openai = createOpenAI({ baseURL: `${api}/v1`, apiKey: "none" });
  const reply = await generateText({ ...asked, model: openai(model), maxOutputTokens: 16 });
  assert.ok(reply.text);
});

test("the provider for OpenAI, which uses chat", async () => {
  const openai = createOpenAI({ baseURL: `${api}/v1`, apiKey: "none" });
  assert.ok((await generateText({ ...asked, model: openai.chat(model) })).text);
});
