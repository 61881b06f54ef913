// The cluster as a picture: the coordinator, the stages in the order of layers, the links between them, idle machines.
// Its elements are made anew where the machines change, else only their figures.

import { fill, svg } from "../dom.js";
import { milliseconds, rate } from "./format.js";
import { HUB, pictureLayout } from "./picture_layout.js";
import { StageBox } from "./stage_box.js";

const NARROW = matchMedia("(max-width: 760px)");

export class Picture {
  #shape = "";
  #boxes = new Map();
  #links = [];

  constructor(parent) {
    this.parent = parent;
  }

  show(state) {
    const names = [...state.stages, ...state.others].map(({ name }) => name);
    const shape = JSON.stringify([names, state.stages.length, state.sharedStages, NARROW.matches]);
    if (shape !== this.#shape) this.#build(state);
    this.#shape = shape;
    for (const worker of [...state.stages, ...state.others]) this.#boxes.get(worker.name).update(worker, state.layerCount);
    const isMoving = state.status.state === "ready" && state.stages.some(({ tokens_per_s: tokens, busy }) => tokens > 0 && busy > 0);
    this.#links.forEach((link, index) => link.update(state.links[index], state.stages[index - 1]?.sentRate, isMoving));
  }

  #build({ stages, others, sharedStages, status }) {
    const layout = pictureLayout(stages.length, others.length, sharedStages, NARROW.matches);
    const corners = [...layout.stages, ...layout.others];
    const boxes = [...stages, ...others].map(({ name }, index) => [name, new StageBox(name, ...corners[index])]);
    this.#boxes = new Map(boxes);
    this.#links = layout.links.map((link) => new LinkLine(link));
    const { width, height } = layout.size;
    const label = `Cluster ${status.name}: the table below has the same figures`;
    const partners = layout.partners.map((path) => svg("path", { class: "partner", d: path }));
    const parts = [partners, this.#links.map(({ node }) => node), hub(...layout.hub), boxes.map(([, box]) => box.node)];
    fill(this.parent, svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, parts));
  }
}

function hub(x, y) {
  return svg(
    "g",
    { class: "stage" },
    svg("rect", { class: "box", x, y, width: HUB.width, height: HUB.height, rx: 10 }),
    svg("text", { class: "name", x: x + HUB.width / 2, y: y + HUB.height / 2 + 5, "text-anchor": "middle" }, "coordinator"),
  );
}

/** A link with its round trip, its bandwidth, what passes it now, and tokens that move. */
class LinkLine {
  #path;
  #above;
  #below;
  #now;
  #tokens;

  /** A link of `pictureLayout`. */
  constructor({ path, x, y, anchor, isReturn = false }) {
    const seconds = isReturn ? 2.4 : 0.9;
    const label = (dy) => svg("text", { class: "faint", x, y: y + dy, "text-anchor": anchor });
    this.#path = svg("path", { class: "link", d: path });
    this.#above = label(-9);
    this.#below = label(19);
    this.#now = label(35);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const delays = still ? [] : [0, 1 / 3, 2 / 3];
    this.#tokens = svg("g", {}, delays.map((delay) => token(path, seconds, delay)));
    this.node = svg("g", {}, this.#path, this.#tokens, this.#above, this.#below, this.#now);
  }

  update(link, sentRate, isMoving) {
    this.#path.classList.toggle("active", isMoving);
    this.#tokens.setAttribute("visibility", isMoving ? "visible" : "hidden");
    this.#above.textContent = link?.round_trip_ms == null ? "" : `${milliseconds(link.round_trip_ms)} round`;
    this.#below.textContent = link?.bytes_per_s == null ? "" : rate(link.bytes_per_s);
    this.#now.textContent = sentRate ? `${rate(sentRate)} now` : "";
  }
}

function token(path, seconds, delay) {
  const motion = svg("animateMotion", { path, dur: `${seconds}s`, begin: `${-delay * seconds}s`, repeatCount: "indefinite" });
  return svg("circle", { class: "moving", r: 3.5 }, motion);
}
