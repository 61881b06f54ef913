// The tokens of an answer, shaded by probability; the likeliest others in a token's place on hover or by arrow keys.

import { element, fill } from "../dom.js";

const STEPS = 6;

/** The view of `tokens`: [text, logprob, [[text, logprob], ...], bytes]. */
export function probabilitiesView(tokens) {
  const detail = element("div", { class: "token-detail", role: "status" }, "Point at a token, or use the arrow keys.");
  const texts = tokenTexts(tokens);
  const marks = tokens.map((token, index) =>
    element("span", { class: `token p${step(token[1])}`, "data-index": index }, texts[index]),
  );
  let current = -1;
  const show = (index) => {
    if (!(index >= 0 && index < tokens.length)) return;
    marks[current]?.classList.remove("current");
    current = index;
    marks[index].classList.add("current");
    fill(detail, rows(tokens[index]));
  };
  const move = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    show(Math.min(tokens.length - 1, Math.max(0, current + by)));
  };
  const text = element(
    "div",
    { class: "tokens", tabindex: "0", role: "group", "aria-label": "Tokens with probabilities", keydown: move },
    marks,
  );
  const pointed = (event) => show(Number(event.target.dataset?.index ?? -1));
  text.addEventListener("pointerover", pointed);
  text.addEventListener("click", pointed);
  return element("div", { class: "probabilities" }, text, detail);
}

/** Of each token; characters whose bytes several tokens make belong to the last of them. */
function tokenTexts(tokens) {
  const decoder = new TextDecoder();
  return tokens.map(([text, , , bytes]) => (bytes ? decoder.decode(new Uint8Array(bytes), { stream: true }) : text));
}

function rows([text, logprob, top]) {
  const others = top.length ? top : [[text, logprob]];
  const isListed = others.some(([other]) => other === text);
  const shown = isListed ? others : [...others, [text, logprob]];
  const marked = shown.map(([other]) => other).indexOf(text);
  return element(
    "dl",
    {},
    shown.map(([other, value], index) => [
      element("dt", { class: index === marked ? "chosen" : null }, visible(other)),
      element("dd", {}, element("meter", { min: 0, max: 1, value: Math.exp(value), "aria-label": `probability of ${visible(other)}` }), percent(value)),
    ]),
  );
}

function step(logprob) {
  return Math.min(STEPS - 1, Math.floor(Math.exp(logprob) * STEPS));
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value > 0 && value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
}

function visible(text) {
  return text === "" ? "∅" : text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}
