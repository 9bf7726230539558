// Builds the parts of the page. Text that came from people enters the document as text nodes, never as markup.

import * as format from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const SHOWN_CHARS = 600;

/** @param {string} id */
export const byId = (id) => /** @type {any} */ (document.getElementById(id));

/** @param {string} tag @param {string} className @param {...(Node | string)} children */
export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** @param {string} tone */
export function mark(tone) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "mark");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#mark-${tone}`);
  svg.append(use);
  return svg;
}

/** @param {string} label */
export function labelTag(label) {
  const tone = format.toneOf(label);
  const tag = element("span", "label", mark(tone), format.labelWord(label));
  tag.dataset.tone = tone;
  return tag;
}

/** A horizontal bar filled to `share` of its width. @param {number} share @param {string} label */
function bar(share, label) {
  const fill = element("span", "bar-fill");
  fill.style.inlineSize = `${Math.max(0, Math.min(1, share)) * 100}%`;
  const track = element("span", "bar", fill);
  track.dataset.tone = format.toneOf(label);
  track.setAttribute("aria-hidden", "true");
  return track;
}

/** Write `text` only when it differs, so that selections and screen readers are left alone. @param {HTMLElement} node @param {string} text */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** @param {Record<string, number>} labels count by label */
export function showShares(labels) {
  const names = format.orderLabels(Object.keys(labels));
  const total = names.reduce((sum, name) => sum + labels[name], 0);
  const segments = names.map((name) => {
    const segment = element("span", "share-segment");
    segment.dataset.tone = format.toneOf(name);
    segment.style.flexGrow = String(labels[name]);
    segment.hidden = labels[name] === 0;
    return segment;
  });
  const rows = names.map((name) =>
    element(
      "li",
      "share",
      labelTag(name),
      element("span", "share-count", format.count(labels[name])),
      element("span", "share-percent", total ? format.finePercent(labels[name] / total) : "–"),
    ),
  );
  byId("share-bar").replaceChildren(...segments);
  byId("shares").replaceChildren(...rows);
}

/** @param {any} post @param {number} nowMs */
function postRow(post, nowMs) {
  const text = element("p", "post-text", shorten(post.text));
  text.dir = "auto";
  const row = element("li", "post", postLabel(post), text, postTime(post.created_at, nowMs));
  row.dataset.postId = post.post_id;
  row.dataset.label = post.label ?? "";
  return row;
}

/** @param {any} post */
function postLabel(post) {
  const cell = element("div", "post-label");
  if (!post.label) {
    cell.append(element("span", "muted", "Waiting"));
    return cell;
  }
  const confidence = element("span", "confidence", format.percent(post.confidence));
  confidence.title = "Confidence";
  cell.append(labelTag(post.label), element("span", "visually-hidden", "confidence "), confidence);
  return cell;
}

/** @param {string} iso @param {number} nowMs */
function postTime(iso, nowMs) {
  const ms = Date.parse(iso);
  const time = /** @type {HTMLTimeElement} */ (element("time", "post-time"));
  if (Number.isNaN(ms)) return time;
  time.dateTime = iso;
  time.title = format.fullTime(ms);
  time.textContent = format.postTime(ms, nowMs);
  return time;
}

/** @param {string} text */
function shorten(text) {
  const chars = [...text];
  return chars.length > SHOWN_CHARS ? `${chars.slice(0, SHOWN_CHARS).join("")}…` : text;
}

/** Show `posts`, newest first; rows already there are kept when nothing in them changed. @param {any[]} posts @param {number} nowMs */
export function showPosts(posts, nowMs) {
  const list = byId("newest");
  const isFirst = list.children.length === 0;
  const present = new Map([...list.children].map((row) => [row.dataset.postId, row]));
  const rows = posts.map((post) => {
    const known = present.get(String(post.post_id));
    if (known && known.dataset.label === (post.label ?? "")) return known;
    const row = postRow(post, nowMs);
    if (!known && !isFirst) row.classList.add("is-new");
    return row;
  });
  const isSame = rows.length === list.children.length && rows.every((row, at) => row === list.children[at]);
  if (!isSame) list.replaceChildren(...rows);
}

/** @param {any} prediction @param {number} elapsedMs */
export function showPrediction(prediction, elapsedMs) {
  const confidence = element("span", "result-confidence", `${format.finePercent(prediction.confidence)} confidence`);
  const names = format.orderLabels(Object.keys(prediction.scores));
  const scores = names.map((name) =>
    element(
      "li",
      "score",
      labelTag(name),
      bar(prediction.scores[name], name),
      element("span", "score-value", format.finePercent(prediction.scores[name])),
    ),
  );
  const result = byId("try-result");
  result.replaceChildren(
    element("p", "result-head", labelTag(prediction.label), confidence),
    element("ul", "scores", ...scores),
    element(
      "p",
      "muted small result-foot",
      element("span", "", `Answered in ${format.milliseconds(elapsedMs)}`),
      element("code", "", prediction.model_version),
    ),
  );
  result.dataset.label = prediction.label;
  result.hidden = false;
}

/** @param {string[]} labels @param {{minute: number, counts: Record<string, number>}[]} rows newest last, minutes in ms */
export function showTable(labels, rows) {
  const header = element("tr", "", ...["Minute", ...labels.map(format.labelWord)].map((word) => element("th", "", word)));
  for (const cell of header.children) cell.setAttribute("scope", "col");
  const body = rows.toReversed().map(({ minute, counts }) => {
    const head = element("th", "", format.clockMinutes(minute));
    head.setAttribute("scope", "row");
    return element("tr", "", head, ...labels.map((name) => element("td", "", format.count(counts[name] ?? 0))));
  });
  byId("table-head").replaceChildren(header);
  byId("table-body").replaceChildren(...body);
}
