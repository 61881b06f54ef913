// A button that copies a text.

import { button, element } from "./dom.js";

const SHOWN_MS = 1500;

/** `text()` gives what is copied. */
export function copyButton(text) {
  const node = button("Copy", async () => {
    node.textContent = (await copied(text())) ? "Copied" : "Not copied";
    setTimeout(() => (node.textContent = "Copy"), SHOWN_MS);
  });
  return node;
}

/** Whether the browser took it. Only pages over https and those of this machine have a clipboard. */
async function copied(text) {
  try {
    if (!navigator.clipboard) return copiedBySelection(text);
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

function copiedBySelection(text) {
  const field = element("textarea", { class: "unseen" }, text);
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  return isCopied;
}
