// Dark or light: as the system has it, until it is chosen here.

import { browserTexts } from "./storage.js";

const KEY = "llamaclust.theme";

export function applyTheme() {
  const chosen = browserTexts.get(KEY);
  if (chosen) document.documentElement.dataset.theme = chosen;
}

export function toggleTheme() {
  const isDark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  browserTexts.set(KEY, isDark ? "light" : "dark");
  applyTheme();
}
