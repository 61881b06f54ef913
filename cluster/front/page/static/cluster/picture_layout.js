// Where the parts of the picture stand: stages side by side, or below each other on narrow screens. Pure.

import { BOX } from "./stage_box.js";

export const HUB = Object.freeze({ width: 118, height: 64 });
const ROW = BOX.height + 26;

/** `{size, hub, stages, others, links}` for so many stages and idle machines. `hub`, `stages` and `others` are corners [x, y];
 *  a link is `{path, x, y, anchor}`, with the place of its labels, from the coordinator through all stages and back. */
export function pictureLayout(stages, others, isNarrow) {
  return isNarrow ? below(stages, others) : beside(stages, others);
}

function beside(count, others) {
  const [gap, top] = [112, 28];
  const middle = top + BOX.height / 2;
  const back = top + BOX.height + 26;
  const columns = Math.max(2, count);
  const left = (index) => HUB.width + gap + 4 + index * (BOX.width + gap);
  const start = back + 50;
  const links = range(count).map((index) => {
    const from = index === 0 ? HUB.width + 2 : left(index - 1) + BOX.width;
    return { path: `M${from} ${middle} H${left(index)}`, x: (from + left(index)) / 2, y: middle, anchor: "middle" };
  });
  if (count) {
    const [end, hub] = [left(count - 1) + BOX.width / 2, 2 + HUB.width / 2];
    const path = `M${end} ${top + BOX.height} V${back} H${hub} V${middle + HUB.height / 2}`;
    links.push({ path, x: (hub + left(0)) / 2 + 40, y: back, anchor: "middle", isReturn: true });
  }
  return {
    size: { width: left(columns) - gap + 8, height: start + Math.ceil(others / columns) * ROW },
    hub: [2, middle - HUB.height / 2],
    stages: range(count).map((index) => [left(index), top]),
    others: range(others).map((index) => [left(index % columns), start + ROW * Math.floor(index / columns)]),
    links,
  };
}

function below(count, others) {
  const [gap, margin] = [62, 26];
  const x = margin + BOX.width / 2;
  const top = (index) => 2 + HUB.height + gap + index * (BOX.height + gap);
  const links = range(count).map((index) => {
    const from = index === 0 ? 2 + HUB.height : top(index - 1) + BOX.height;
    return { path: `M${x} ${from} V${top(index)}`, x: x + 10, y: (from + top(index)) / 2 - 8, anchor: "start" };
  });
  if (count) {
    const end = top(count - 1) + BOX.height / 2;
    const path = `M${margin} ${end} H6 V${2 + HUB.height / 2} H${x - HUB.width / 2}`;
    links.push({ path, x: 10, y: 2 + HUB.height + gap / 2 - 8, anchor: "start", isReturn: true });
  }
  const start = top(count);
  return {
    size: { width: BOX.width + 2 * margin, height: start + others * ROW },
    hub: [x - HUB.width / 2, 2],
    stages: range(count).map((index) => [margin, top(index)]),
    others: range(others).map((index) => [margin, start + index * ROW]),
    links,
  };
}

function range(count) {
  return Array.from({ length: count }, (_, index) => index);
}
