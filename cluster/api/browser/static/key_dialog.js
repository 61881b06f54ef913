// A form for the API key of a server that needs one.

import { apiKey, setApiKey } from "./api.js";
import { button, element } from "./dom.js";

/** A dialog; `onChange` comes once a key was entered or taken away. */
export function keyDialog(onChange) {
  const field = element("input", { type: "password", autocomplete: "off", spellcheck: "false" });
  const problem = element("p", { class: "error", role: "alert" });
  const set = (event) => {
    event.preventDefault();
    setApiKey(field.value.trim());
    dialog.close();
    onChange();
  };
  const buttons = [element("button", { type: "submit", class: "primary" }, "Use"), button("Cancel", () => dialog.close())];
  const parts = [
    element("h2", { id: "key-title" }, "API key"),
    element("p", {}, "Kept in this tab until it is closed; sent to this server alone."),
    element("label", {}, "Key", field),
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
      dialog.showModal();
    },
  };
}
