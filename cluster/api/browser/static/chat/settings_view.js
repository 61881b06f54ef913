// The settings of answers as a form.

import { button, element } from "../dom.js";
import { NUMBERS, saveSettings } from "./settings.js";

/** A dialog that changes `settings` in place. `onChange` comes with each change. */
export function settingsDialog(settings, onChange) {
  const change = () => {
    saveSettings(settings);
    onChange();
  };
  const system = element("textarea", { rows: "4", change: (event) => ((settings.system = event.target.value), change()) }, settings.system);
  const parts = [
    element("h2", { id: "settings-title" }, "Settings"),
    element("label", {}, "System prompt of new chats", system),
    element("div", { class: "grid" }, NUMBERS.map((number) => numberField(number, settings, change))),
    toggle("Show reasoning", "showsReasoning", settings, change),
    toggle("Show probabilities of tokens", "showsProbabilities", settings, change),
  ];
  const dialog = element("dialog", { class: "panel", "aria-labelledby": "settings-title" }, parts);
  dialog.append(element("div", { class: "actions" }, button("Close", () => dialog.close(), { class: "primary" })));
  return dialog;
}

function numberField({ name, label, ...bounds }, settings, change) {
  const set = (event) => {
    const field = event.target;
    if (!field.reportValidity()) return;
    if (field.value === "") delete settings.numbers[name];
    else settings.numbers[name] = field.valueAsNumber;
    change();
  };
  const value = settings.numbers[name] ?? "";
  return element("label", {}, label, element("input", { type: "number", ...bounds, placeholder: "default", value, change: set }));
}

function toggle(label, name, settings, change) {
  const set = (event) => ((settings[name] = event.target.checked), change());
  return element("label", { class: "toggle" }, element("input", { type: "checkbox", checked: settings[name], change: set }), label);
}
