// Figures as text.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
export const UNKNOWN = "–";

export function bytes(value) {
  if (value === null || value === undefined) return UNKNOWN;
  const power = value < 1 ? 0 : Math.min(UNITS.length - 1, Math.floor(Math.log2(value) / 10));
  const scaled = value / 1024 ** power;
  return `${scaled < 10 && power > 0 ? scaled.toFixed(1) : Math.round(scaled)} ${UNITS[power]}`;
}

export function rate(value) {
  return value === null || value === undefined ? UNKNOWN : `${bytes(value)}/s`;
}

export function milliseconds(value) {
  if (value === null || value === undefined) return UNKNOWN;
  if (value >= 10000) return `${(value / 1000).toFixed(1)} s`;
  return `${value < 0.1 ? value.toFixed(3) : value < 10 ? value.toFixed(2) : value.toFixed(0)} ms`;
}

export function number(value, digits = 1) {
  return value === null || value === undefined ? UNKNOWN : value.toFixed(value >= 100 ? 0 : digits);
}

export function percent(share) {
  return `${Math.round(100 * share)} %`;
}

/** `share`: of a group's member; null: it holds the layers alone. */
export function layers(range, share = null) {
  if (!range) return "no layers";
  return `${share ? `${percent(share)} of ` : ""}layers ${range[0]}–${range[1] - 1}`;
}
