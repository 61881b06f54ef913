// Where the parts of the picture stand: stages side by side, or below each other on narrow screens. Pure.

import { BOX } from "./stage_box.js";

export const HUB = Object.freeze({ width: 118, height: 64 });
const ROW = BOX.height + 26;

/** `{size, hub, stages, others, links, partners}` for so many stages and other machines. `sharedStages` has the index of the
 *  stage that each of the first other machines shares. `hub`, `stages` and `others` are corners [x, y]; a link is `{path, x, y,
 *  anchor}`, with the place of its labels, from the coordinator through all stages and back; partners are paths, too. */
export function pictureLayout(stages, others, sharedStages, isNarrow) {
  return isNarrow ? below(stages, others, sharedStages) : beside(stages, others, sharedStages);
}

function beside(count, others, sharedStages) {
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
  const corner = (index) => [left(index % columns), start + ROW * Math.floor(index / columns)];
  return {
    size: { width: left(columns) - gap + 8, height: start + Math.ceil(others / columns) * ROW },
    hub: [2, middle - HUB.height / 2],
    stages: range(count).map((index) => [left(index), top]),
    others: range(others).map(corner),
    links,
    partners: sharedStages.map((stage, index) => {
      const [x, y] = corner(index);
      const half = BOX.width / 2 + 24; // beside the return link
      return `M${left(stage) + half} ${top + BOX.height} L${x + half} ${y}`;
    }),
  };
}

function below(count, others, sharedStages) {
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
    partners: sharedStages.map((stage, index) => {
      const [right, from, to] = [margin + BOX.width, top(stage) + BOX.height / 2, start + index * ROW + BOX.height / 2];
      return `M${right} ${from} h14 V${to} h-14`;
    }),
  };
}

function range(count) {
  return Array.from({ length: count }, (_, index) => index);
}
