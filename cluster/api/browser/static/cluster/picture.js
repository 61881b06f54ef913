// The cluster as a picture: the coordinator, the stages in the order of layers, the links between them, idle machines.
// Its elements are made anew where the machines change, else only their figures.

import { fill, svg } from "../dom.js";
import { milliseconds, rate } from "./format.js";
import { BOX, StageBox } from "./stage_box.js";

const GAP = 112;
const TOP = 28;
const ROW = BOX.height + 26;
const HUB = { width: 118, height: 64 };
const MIDDLE = TOP + BOX.height / 2;
const RETURN = TOP + BOX.height + 26;

export class Picture {
  #shape = "";
  #boxes = new Map();
  #links = [];

  constructor(parent) {
    this.parent = parent;
  }

  show(state) {
    const names = [...state.stages, ...state.others].map(({ name }) => name);
    const shape = JSON.stringify([names, state.stages.length]);
    if (shape !== this.#shape) this.#build(state);
    this.#shape = shape;
    for (const worker of [...state.stages, ...state.others]) this.#boxes.get(worker.name).update(worker, state.layerCount);
    const isMoving = state.status.state === "ready" && state.stages.some(({ tokens_per_s: tokens, busy }) => tokens > 0 && busy > 0);
    this.#links.forEach((link, index) => link.update(state.links[index], state.stages[index - 1]?.sentRate, isMoving));
  }

  #build({ stages, others, status }) {
    const left = HUB.width + GAP + 4;
    const place = (index) => left + index * (BOX.width + GAP);
    const below = RETURN + 50;
    const columns = Math.max(2, stages.length);
    const boxes = [
      ...stages.map(({ name }, index) => [name, new StageBox(name, place(index), TOP)]),
      ...others.map(({ name }, index) => [
        name,
        new StageBox(name, place(index % columns), below + ROW * Math.floor(index / columns)),
      ]),
    ];
    this.#boxes = new Map(boxes);
    this.#links = linksBetween(stages.length, place);
    const rows = Math.ceil(others.length / columns);
    const size = { width: place(columns) - GAP + 8, height: below + rows * ROW };
    const picture = svg(
      "svg",
      { ...size, viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": `Cluster ${status.name}: the table below has the same figures` },
      this.#links.map(({ node }) => node),
      hub(),
      boxes.map(([, box]) => box.node),
    );
    fill(this.parent, picture);
  }
}

/** From the coordinator through all stages, and back from the last one. */
function linksBetween(count, place) {
  if (!count) return [];
  const straight = Array.from({ length: count }, (_, index) => {
    const from = index === 0 ? HUB.width + 2 : place(index - 1) + BOX.width;
    return new LinkLine(`M${from} ${MIDDLE} H${place(index)}`, (from + place(index)) / 2, MIDDLE);
  });
  const [end, start] = [place(count - 1) + BOX.width / 2, 2 + HUB.width / 2];
  const bend = `M${end} ${TOP + BOX.height} V${RETURN} H${start} V${MIDDLE + HUB.height / 2}`;
  return [...straight, new LinkLine(bend, (start + place(0)) / 2 + 40, RETURN, 2.4)];
}

function hub() {
  const y = MIDDLE - HUB.height / 2;
  return svg(
    "g",
    { class: "stage" },
    svg("rect", { class: "box", x: 2, y, width: HUB.width, height: HUB.height, rx: 10 }),
    svg("text", { class: "name", x: 2 + HUB.width / 2, y: MIDDLE + 5, "text-anchor": "middle" }, "coordinator"),
  );
}

/** A link with its round trip, its bandwidth, what passes it now, and tokens that move. */
class LinkLine {
  #path;
  #above;
  #below;
  #now;
  #tokens;

  constructor(path, x, y, seconds = 0.9) {
    const label = (dy) => svg("text", { class: "faint", x, y: y + dy, "text-anchor": "middle" });
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
