// The settings of answers as a form.

import { button, element } from "../dom.js";
import { NUMBERS, saveSettings } from "./settings.js";

const NONE = { max_tokens: "no limit", seed: "random" };

/** A dialog that changes `settings` in place. `onChange` comes with each change. Empty fields show the values of the chosen
 *  one of `models`. */
export function settingsDialog(settings, models, onChange) {
  const change = () => {
    saveSettings(settings);
    onChange();
  };
  const system = element("textarea", { rows: "4", change: (event) => ((settings.system = event.target.value), change()) }, settings.system);
  const fields = NUMBERS.map((number) => numberField(number, settings, change));
  const showDefaults = () => {
    const sampling = models.chosen?.chat_sampling ?? {};
    for (const field of fields) {
      const input = field.querySelector("input");
      input.placeholder = sampling[input.name] ?? NONE[input.name] ?? "";
    }
  };
  models.addEventListener("change", showDefaults);
  showDefaults();
  const parts = [
    element("h2", { id: "settings-title" }, "Settings"),
    element("label", {}, "System prompt of new chats", system),
    element("div", { class: "grid" }, fields),
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
  return element("label", {}, label, element("input", { type: "number", name, ...bounds, value, change: set }));
}

function toggle(label, name, settings, change) {
  const set = (event) => ((settings[name] = event.target.checked), change());
  return element("label", { class: "toggle" }, element("input", { type: "checkbox", checked: settings[name], change: set }), label);
}
