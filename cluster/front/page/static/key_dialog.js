// A form for the API key of a server that needs one.

import { apiKey, isKeyKept, isSendable, setApiKey } from "./api.js";
import { button, element } from "./dom.js";

/** A dialog that sets the key, or forgets it where the field is left empty. */
export function keyDialog() {
  const field = element("input", { type: "password", autocomplete: "off", spellcheck: "false" });
  const kept = element("input", { type: "checkbox" });
  const problem = element("p", { class: "error", role: "alert" });
  const set = (event) => {
    event.preventDefault();
    const key = field.value.trim();
    if (!isSendable(key)) {
      problem.textContent = "An API key has printable ASCII characters alone, and no spaces.";
      return;
    }
    setApiKey(key, kept.checked);
    dialog.close();
  };
  const buttons = [element("button", { type: "submit", class: "primary" }, "Use"), button("Cancel", () => dialog.close())];
  const parts = [
    element("h2", { id: "key-title" }, "API key"),
    element("p", {}, "Sent to this server alone."),
    element("label", {}, "Key", field),
    element("label", { class: "toggle" }, kept, "Keep it in this browser, for all tabs"),
    problem,
    element("div", { class: "actions" }, buttons),
  ];
  const dialog = element("dialog", { class: "panel", "aria-labelledby": "key-title" }, element("form", { submit: set }, parts));
  return {
    node: dialog,
    /** `error`: what is wrong with the key that was used; "" for nothing. */
    open(error) {
      if (dialog.open) return;
      problem.textContent = error;
      field.value = apiKey();
      kept.checked = isKeyKept() || !apiKey();
      dialog.showModal();
    },
  };
}
