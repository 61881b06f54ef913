// The settings of answers, kept in this browser.

import { browserTexts } from "../storage.js";

const KEY = "llamaclust.settings";

/** Each number: the field of a request, its label, bounds and step. */
export const NUMBERS = Object.freeze([
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.01 },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Maximum tokens", min: 1, max: 1000000, step: 1 },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
]);

const INITIAL = { numbers: {}, system: "", showsProbabilities: false, showsReasoning: true };

export function loadSettings() {
  try {
    return { ...structuredClone(INITIAL), ...JSON.parse(browserTexts.get(KEY) ?? "{}") };
  } catch {
    return structuredClone(INITIAL);
  }
}

export function saveSettings(settings) {
  browserTexts.set(KEY, JSON.stringify(settings));
}

/** The body of a request for an answer. `fields`: the model and its sampling, for fields that are left empty. `seed` goes before
 *  the one of the settings. */
export function requestBody(settings, messages, fields, seed = null) {
  const numbers = { ...fields, ...settings.numbers, ...(seed === null ? {} : { seed }) };
  const tokens = settings.showsProbabilities ? { logprobs: true, top_logprobs: 5 } : {};
  return { messages, stream: true, stream_options: { include_usage: true }, ...numbers, ...tokens };
}
