// Numbers, times and labels as people read them.

const whole = new Intl.NumberFormat();
const compact = new Intl.NumberFormat(undefined, { notation: "compact", maximumFractionDigits: 1 });
const oneDigit = new Intl.NumberFormat(undefined, { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const percents = new Intl.NumberFormat(undefined, { style: "percent", maximumFractionDigits: 0 });
const finePercents = new Intl.NumberFormat(undefined, { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const seconds = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const minutes = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const day = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
const full = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "long" });

const DAY_MS = 86_400_000;
const KNOWN_LABELS = ["negative", "neutral", "positive"];

/** @param {number} value */
export const count = (value) => whole.format(value);
/** @param {number} value */
export const shortCount = (value) => compact.format(value);
/** @param {number} value */
export const rate = (value) => (value >= 100 ? whole.format(Math.round(value)) : oneDigit.format(value));
/** @param {number} share */
export const percent = (share) => percents.format(share);
/** @param {number} share */
export const finePercent = (share) => finePercents.format(share);
/** @param {number} ms */
export const clockSeconds = (ms) => seconds.format(ms);
/** @param {number} ms */
export const clockMinutes = (ms) => minutes.format(ms);
/** @param {number} ms */
export const fullTime = (ms) => full.format(ms);
/** @param {number} ms */
export const milliseconds = (ms) => `${ms < 100 ? oneDigit.format(ms) : whole.format(Math.round(ms))} ms`;

/** A time of day, with the date when `ms` is more than a day from `nowMs`. @param {number} ms @param {number} nowMs */
export const postTime = (ms, nowMs) => (Math.abs(nowMs - ms) < DAY_MS ? seconds : day).format(ms);

/** @param {string} label */
export const labelWord = (label) => label.charAt(0).toUpperCase() + label.slice(1);

/** The tone that style.css knows for a label; labels of other bundles share one mark. @param {string} label */
export const toneOf = (label) => (KNOWN_LABELS.includes(label) ? label : "other");

/**
 * `counts` with a zero for each known label that was not seen yet; those of a bundle with labels of its own as they are.
 * @param {Record<string, number>} counts
 */
export function withUnseenLabels(counts) {
  const isKnown = Object.keys(counts).every((name) => KNOWN_LABELS.includes(name));
  return isKnown ? { ...Object.fromEntries(KNOWN_LABELS.map((name) => [name, 0])), ...counts } : counts;
}

/** Known labels in their own order, then any others by name. @param {Iterable<string>} labels */
export function orderLabels(labels) {
  const names = new Set(labels);
  const others = [...names].filter((name) => !KNOWN_LABELS.includes(name)).sort();
  return [...KNOWN_LABELS.filter((name) => names.has(name)), ...others];
}
