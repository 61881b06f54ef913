// Elements of the page. Text is always text: nothing here takes markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Functions among `properties` are listeners, by event name; null and false leave an attribute away. */
export function element(tag, properties = {}, ...children) {
  return built(document.createElement(tag), properties, children);
}

/** The same for pictures. */
export function svg(tag, properties = {}, ...children) {
  return built(document.createElementNS(SVG, tag), properties, children);
}

/** A button whose label is its accessible name; `symbol` is what is seen, where that is something else. */
export function button(label, action, { symbol = null, ...properties } = {}) {
  const named = symbol === null ? {} : { "aria-label": label, title: label };
  return element("button", { type: "button", click: action, ...named, ...properties }, symbol ?? label);
}

/** The key of an event, "" for one that an input method takes. Safari reports its last one as code 229 alone. */
export function pressedKey({ key, isComposing, keyCode }) {
  return isComposing || keyCode === 229 ? "" : key;
}

/** Replaces what an element holds. */
export function fill(parent, ...children) {
  parent.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return parent;
}

function built(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
