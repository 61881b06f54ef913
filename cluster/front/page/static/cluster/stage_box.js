// A machine in the picture: its layers, memory and busy share.

import { svg } from "../dom.js";
import { bytes, layers, milliseconds, number, percent } from "./format.js";

export const BOX = Object.freeze({ width: 214, height: 168 });

const PAD = 14;
const INNER = BOX.width - 2 * PAD;
const NAME = 17; // characters beside the condition
const MEMORIES = [
  ["weights", "weight_bytes"],
  ["kv", "kv_bytes"],
  ["workspace", "workspace_bytes"],
];

/** What a group's member holds of the layers; null: it holds them alone. */
function plannedShare(planned) {
  return planned?.shares?.length ? planned.shares[planned.member] / planned.shares.reduce((sum, share) => sum + share, 0) : null;
}

export class StageBox {
  #texts;
  #bars;

  constructor(name, x, y) {
    const text = (kind, dx, dy, content = "", anchor = null) =>
      svg("text", { class: kind, x: dx, y: dy, "text-anchor": anchor }, content);
    const bar = (kind, dy) => svg("rect", { class: kind, x: PAD, y: dy, width: 0, height: 7 });
    const track = (dy) => svg("rect", { class: "track", x: PAD, y: dy, width: INNER, height: 7, rx: 2 });
    this.#texts = {
      condition: text("condition faint", BOX.width - PAD, 25, "", "end"),
      layers: text("faint", PAD, 46),
      memory: text("faint", PAD, 78),
      busy: text("faint", PAD, 110),
      time: text("faint", PAD, 142),
      tokens: text("faint", PAD, 158),
    };
    this.#bars = {
      layers: bar("held", 52),
      weights: bar("weights", 84),
      kv: bar("kv", 84),
      workspace: bar("workspace", 84),
      busy: bar("busy", 116),
    };
    const box = svg("rect", { class: "box", width: BOX.width, height: BOX.height, rx: 10 });
    const named = text("name", PAD, 25, name.length > NAME ? `${name.slice(0, NAME - 1)}…` : name);
    const parts = [box, svg("title", {}, name), named, track(52), track(84), track(116)];
    this.node = svg("g", { transform: `translate(${x} ${y})` }, parts, Object.values(this.#bars), Object.values(this.#texts));
  }

  update(worker, layerCount) {
    const { condition, planned, busy } = worker;
    this.node.setAttribute("class", `stage ${condition}`);
    this.#texts.condition.textContent = condition;
    this.#texts.layers.textContent = layers(worker.layers ?? (planned && [planned.start, planned.end]), plannedShare(planned));
    this.#showLayers(worker, layerCount);
    this.#showMemory(worker);
    this.#texts.busy.textContent = `busy ${percent(busy)}`;
    this.#bars.busy.setAttribute("width", INNER * Math.min(1, busy));
    const plannedTime = planned?.decode_ms ? ` (plan ${milliseconds(planned.decode_ms)})` : "";
    this.#texts.time.textContent = `${milliseconds(worker.decode_ms)} per token${plannedTime}`;
    this.#texts.tokens.textContent = `${number(worker.tokens_per_s)} tokens/s`;
  }

  #showLayers({ layers: held, planned }, layerCount) {
    const [start, end] = held ?? (planned ? [planned.start, planned.end] : [0, 0]);
    const scale = layerCount ? INNER / layerCount : 0;
    this.#bars.layers.setAttribute("x", PAD + start * scale);
    this.#bars.layers.setAttribute("width", (end - start) * scale);
  }

  #showMemory({ planned, memory_bytes: held, heartbeat }) {
    const parts = MEMORIES.map(([name, field]) => [name, planned?.[field] ?? 0]);
    const used = parts.reduce((sum, [, size]) => sum + size, 0);
    const room = Math.max(planned?.memory_bytes ?? held + (heartbeat?.free_memory_bytes ?? 0), used, 1);
    let x = PAD;
    for (const [name, size] of parts) {
      const width = held ? (INNER * size) / room : 0;
      this.#bars[name].setAttribute("x", x);
      this.#bars[name].setAttribute("width", width);
      x += width;
    }
    this.#texts.memory.textContent = `${bytes(held)} of ${bytes(room)}`;
  }
}
