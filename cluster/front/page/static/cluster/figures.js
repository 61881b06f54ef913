// The figures of the whole cluster, measured beside planned.

import { element, fill } from "../dom.js";
import { UNKNOWN, bytes, milliseconds, number } from "./format.js";

const BLOCK_TOKENS = 16; // KV memory is given in such pieces

/** What a token waits in the gathers of a group. */
function gatherTime({ members, gathers_ms: time, predicted_gathers_ms: planned, waits_most_for: slowest }) {
  const name = members.map(({ worker }) => worker).join("+");
  return [`gathers of ${name}`, [milliseconds(time), `plan ${milliseconds(planned)}${slowest ? `, mostly for ${slowest}` : ""}`]];
}

export class FiguresCard {
  #list = element("dl", { class: "figures" });

  constructor() {
    this.node = element("section", { class: "card", "aria-label": "Figures" }, this.#list);
  }

  show({ status, plan }) {
    const { measured, predicted } = status.speed;
    const beside = (value, planned) => [value, `plan ${planned}`];
    const { requests, recovery_seconds: seconds } = status;
    const last = seconds.at(-1);
    const gathers = (status.groups ?? []).map(gatherTime);
    const entries = [
      ["requests running", [requests.running, `${requests.waiting} waiting`]],
      ["tokens/s", beside(number(measured.tokens_per_s), number(predicted.tokens_per_s))],
      ["token to token", beside(milliseconds(measured.token_ms), milliseconds(predicted.token_ms))],
      ...gathers,
      ["first token", beside(milliseconds(measured.ttft_ms), `${milliseconds(predicted.ttft_ms)} for ${predicted.prompt_tokens ?? UNKNOWN} tokens`)],
      ["bottleneck", [predicted.bottleneck ?? UNKNOWN, "of the plan"]],
      ["KV memory", [bytes(plan.stages.reduce((sum, stage) => sum + stage.kv_bytes, 0)), `room for ${plan.kv_blocks * BLOCK_TOKENS} tokens`]],
      ["recoveries", [status.recoveries, last === undefined ? "none yet" : `the last in ${number(last, 2)} s`]],
      ["state", [status.state, status.retiring_epoch ? "requests move to new layers" : `plan ${status.epoch ?? UNKNOWN}`]],
    ];
    fill(this.#list, entries.map(([title, [value, small]]) =>
      element("div", {}, element("dt", {}, title), element("dd", {}, String(value), element("small", {}, small))),
    ));
  }
}
