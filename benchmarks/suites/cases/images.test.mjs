// Requests with images of the clients for JavaScript. The model has random weights: its answers say nothing.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Anthropic } from "@anthropic-ai/sdk";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { Ollama } from "ollama";
import { OpenAI } from "openai";
import { api, model } from "./server.mjs";

const png =
  "iVBORw0KGgoAAAANSUhEUgAAACgAAAAeAQMAAABkE86eAAAABlBMVEXcKB4UPMh8jxkjAAAAFklEQVR42mNgYOD//5+JgYGBgWGokAB9JwJIyoDJ" +
  "ugAAAABJRU5ErkJggg==";
const webp = "UklGRjQAAABXRUJQVlA4TCcAAAAvJ0AHACCTtvFZ7dUzdm7fFfSHov9kkzZJuvcOC2Kw+3LH7I7hzDMA";
const svg = Buffer.from("<svg xmlns='http://www.w3.org/2000/svg'/>").toString("base64");
const leastRows = 16; // of an image
const text = "What is this?";
const url = (data, kind) => `data:image/${kind};base64,${data}`;
const textPart = { type: "text", text };

const openai = new OpenAI({ baseURL: `${api}/v1`, apiKey: "none", maxRetries: 0 });
const imageUrl = (data, kind) => ({ type: "image_url", image_url: { url: url(data, kind) } });
const chat = (...parts) => ({ model, messages: [{ role: "user", content: parts }], max_tokens: 8 });

test("openai: chat", async () => {
  const asked = [[textPart], [textPart, imageUrl(png, "png")], [textPart, imageUrl(png, "png"), imageUrl(webp, "webp")]];
  const counts = [];
  for (const parts of asked) {
    counts.push((await openai.chat.completions.create(chat(...parts))).usage.prompt_tokens);
  }
  assert.ok(counts[1] >= counts[0] + leastRows && counts[2] >= counts[1] + leastRows, `${counts}`);
});

test("openai: a stream of chat", async () => {
  const asked = chat(textPart, imageUrl(png, "png"));
  const whole = await openai.chat.completions.create(asked);
  let found = "";
  for await (const chunk of await openai.chat.completions.create({ ...asked, stream: true })) {
    found += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(found, whole.choices[0].message.content);
});

test("openai: responses", async () => {
  const image = { type: "input_image", image_url: url(png, "png"), detail: "auto" };
  const input = [{ role: "user", content: [{ type: "input_text", text }, image] }];
  const asked = { model, input, max_output_tokens: 16 };
  const reply = await openai.responses.create(asked);
  assert.ok(reply.usage.input_tokens > leastRows);
  const streamed = await openai.responses.stream(asked).finalResponse();
  assert.equal(streamed.output_text, reply.output_text);
});

test("openai: refusals", async () => {
  const create = (image) => openai.chat.completions.create(chat(textPart, image));
  await assert.rejects(create(imageUrl(svg, "svg+xml")), OpenAI.BadRequestError);
  await assert.rejects(create(imageUrl(png.slice(0, 60), "png")), OpenAI.BadRequestError);
});

test("anthropic: messages", async () => {
  const client = new Anthropic({ baseURL: api, apiKey: "none", maxRetries: 0 });
  const block = (data, kind) => ({ type: "image", source: { type: "base64", media_type: `image/${kind}`, data } });
  const asked = { model, messages: [{ role: "user", content: [block(png, "png"), block(webp, "webp"), textPart] }] };
  const counted = (await client.messages.countTokens(asked)).input_tokens;
  const reply = await client.messages.create({ ...asked, max_tokens: 8 });
  assert.ok(counted > 2 * leastRows);
  assert.equal(reply.usage.input_tokens + (reply.usage.cache_read_input_tokens ?? 0), counted);
  const streamed = await client.messages.stream({ ...asked, max_tokens: 8 }).finalMessage();
  assert.deepEqual(streamed.content, reply.content);
});

test("ollama: chat and generate", async () => {
  const client = new Ollama({ host: api });
  const images = [png, new Uint8Array(Buffer.from(webp, "base64"))];
  const options = { num_predict: 8 };
  const asked = { model, messages: [{ role: "user", content: text, images }], options };
  const reply = await client.chat(asked);
  assert.ok(reply.prompt_eval_count > 2 * leastRows);
  let found = "";
  for await (const part of await client.chat({ ...asked, stream: true })) found += part.message.content;
  assert.equal(found, reply.message.content);
  assert.ok((await client.generate({ model, prompt: text, images, options })).prompt_eval_count > 2 * leastRows);
});

const compatible = createOpenAICompatible({ name: "llamaclust", baseURL: `${api}/v1`, apiKey: "none" });
const provider = createOpenAI({ baseURL: `${api}/v1`, apiKey: "none" });
const models = {
  "openai-compatible": compatible(model),
  "openai, chat": provider.chat(model),
  "openai, responses": provider(model),
};
const bytes = new Uint8Array(Buffer.from(png, "base64"));

for (const [name, used] of Object.entries(models)) {
  test(`ai-sdk: ${name}`, async () => {
    const files = [
      { type: "file", mediaType: "image/png", data: bytes },
      { type: "file", mediaType: "image/webp", data: url(webp, "webp") },
    ];
    const messages = [{ role: "user", content: [textPart, ...files] }];
    const asked = { model: used, messages, maxOutputTokens: 16, maxRetries: 0 };
    const reply = await generateText(asked);
    assert.ok(reply.usage.inputTokens > 2 * leastRows);
    let found = "";
    for await (const part of streamText(asked).textStream) found += part;
    assert.equal(found, reply.text);
  });
}
