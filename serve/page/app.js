// The live page: signs in, asks the server for figures every two seconds while it is looked at, and says what is wrong
// when they do not come.

import { ApiError, getStats, isSignedIn, predict, signIn, signOut } from "./api.js";
import { fillMinutes, SentimentChart } from "./chart.js";
import * as format from "./format.js";
import { byId, setText, showPosts, showPrediction, showShares, showTable } from "./view.js";

const POLL_MS = 2_000;
const LONGEST_WAIT_MS = 15_000;
const SUMMARY_MS = 30_000;
const MINUTES = 30;
const NEWEST = 20;
const MAX_TEXT_CHARS = 25_000;

const SESSION_ENDED = "Your session has ended. Sign in again.";
const LACKS_READ = "This key may not read the figures: it lacks the scope “read”. Use another.";

const chart = new SentimentChart(byId("chart"), byId("legend"));
const state = {
  /** @type {"connecting" | "sign-in" | "dashboard"} */
  view: "connecting",
  isPaused: false,
  failures: 0,
  updatedMs: 0,
  summaryMs: 0,
  timer: 0,
  /** Grows with every change of view, so that an answer to an older question is dropped. */
  turn: 0,
};

// --- views

/** @param {"connecting" | "sign-in" | "dashboard"} view */
function setView(view) {
  state.view = view;
  state.turn += 1;
  document.body.dataset.view = view;
  byId("sign-out").hidden = view !== "dashboard";
  if (view === "dashboard") return;
  for (const id of ["source", "model"]) byId(id).hidden = true;
  setText(byId("updated"), "");
}

/** @param {string} reason */
function askForKey(reason) {
  const wasSignedIn = state.view === "dashboard";
  setView("sign-in");
  setStatus("signed-out", "Signed out");
  setBanner("");
  clearPosts();
  setText(byId("sign-in-error"), reason);
  if (wasSignedIn || document.activeElement === document.body) byId("key").focus();
}

function clearPosts() {
  byId("newest").replaceChildren();
  byId("try-result").hidden = true;
  byId("try-text").value = "";
  showTextLength();
}

/** @param {string} name @param {string} words */
function setStatus(name, words) {
  byId("status").dataset.state = name;
  setText(byId("status-text"), words);
}

/** @param {string} message empty to take the banner away */
function setBanner(message) {
  const banner = byId("banner");
  setText(banner, message);
  banner.hidden = !message;
}

// --- polling

/** @param {number} delayMs */
function schedule(delayMs) {
  clearTimeout(state.timer);
  state.timer = setTimeout(tick, delayMs);
}

async function tick() {
  clearTimeout(state.timer);
  if (document.hidden || state.view === "sign-in") return;
  const turn = state.turn;
  try {
    if (state.view === "connecting") await start();
    else await refresh(turn);
    state.failures = 0;
  } catch (error) {
    if (turn === state.turn) recover(toApiError(error));
  }
}

async function start() {
  if (!(await isSignedIn())) {
    askForKey("");
    return;
  }
  setView("dashboard");
  schedule(0);
}

/** @param {number} turn */
async function refresh(turn) {
  const { stats, nowMs } = await getStats(MINUTES, NEWEST);
  if (turn !== state.turn) return;
  show(stats, nowMs);
  schedule(POLL_MS);
}

/** @param {unknown} error */
function toApiError(error) {
  if (error instanceof ApiError) return error;
  console.error(error);
  return new ApiError("failed");
}

/** @param {ApiError} error */
function recover(error) {
  if (error.kind === "signed-out") {
    askForKey(SESSION_ENDED);
    return;
  }
  if (error.kind === "forbidden") {
    askForKey(LACKS_READ);
    return;
  }
  state.failures += 1;
  const [name, words, message] = describe(error);
  setStatus(name, words);
  setBanner(state.updatedMs ? `${message} The figures are from ${format.clockSeconds(state.updatedMs)}.` : message);
  const backoffMs = Math.min(POLL_MS * 2 ** (state.failures - 1), LONGEST_WAIT_MS);
  schedule(Math.min(Math.max(backoffMs, error.retryAfterS * 1000), 60_000));
}

/** @param {ApiError} error @returns {[string, string, string]} state, words of the status, message */
function describe(error) {
  if (error.kind === "unreachable") return ["offline", "Not connected", "The server cannot be reached. Trying again by itself."];
  if (error.code === "database_unavailable") return ["busy", "No database", "The database cannot be reached, so no new figures come. Trying a text still works."];
  if (error.code === "overloaded" || error.status === 429) return ["busy", "Busy", "The server is overloaded. Trying again by itself."];
  if (error.kind === "busy") return ["busy", "Not ready", "The server is not ready yet. Trying again by itself."];
  return ["offline", "Failing", `The server could not answer${error.status ? ` (status ${error.status})` : ""}. Trying again by itself.`];
}

// --- figures

/** @param {any} answer of `GET /stats` @param {number} nowMs */
function show(answer, nowMs) {
  const stats = { ...answer, labels: format.withUnseenLabels(answer.labels) };
  state.updatedMs = Date.now();
  setBanner("");
  setStatus("live", "Live");
  showSource(stats.source, stats.model_version);
  showFigures(stats);
  showShares(stats.labels);
  showChart(stats, nowMs);
  if (!state.isPaused) showPosts(stats.newest, nowMs);
  setEmpty("newest-empty", !byId("newest").children.length, "No posts yet. They appear here as soon as the first one is stored.");
  setText(byId("updated"), `Updated ${format.clockSeconds(state.updatedMs)}`);
}

/** @param {string | null} source the stream the newest posts came by @param {string | null} version */
function showSource(source, version) {
  const isSimulated = /^simulat/i.test(source ?? "");
  const badge = byId("source");
  badge.dataset.kind = isSimulated ? "simulator" : "real";
  badge.hidden = !source;
  badge.title = isSimulated ? "The built-in simulator makes up these posts; none come from X." : "";
  setText(badge, isSimulated ? "Simulator: not real posts" : /^filtered_stream/.test(source ?? "") ? "Posts from X" : `Source: ${source}`);
  if (!version) return; // none of the newest posts is classified yet: the last known model still stands
  byId("model").hidden = false;
  setText(byId("model-version"), version);
}

/** @param {any} stats */
function showFigures(stats) {
  setText(byId("posts"), format.count(stats.posts));
  setText(byId("predictions"), format.count(stats.predictions));
  setText(byId("posts-rate"), format.rate(stats.per_second.posts));
  setText(byId("predictions-rate"), format.rate(stats.per_second.predictions));
  if (Date.now() - state.summaryMs < SUMMARY_MS) return;
  state.summaryMs = Date.now();
  const labels = format.orderLabels(Object.keys(stats.labels)).map((name) => `${format.count(stats.labels[name])} ${name}`);
  setText(byId("summary"), `${format.count(stats.posts)} posts, ${format.count(stats.predictions)} predictions: ${labels.join(", ")}.`);
}

/** @param {any} stats @param {number} nowMs */
function showChart(stats, nowMs) {
  const rows = fillMinutes(stats.series, nowMs, MINUTES);
  const labels = format.orderLabels([...Object.keys(stats.labels), ...rows.flatMap(({ counts }) => Object.keys(counts))]);
  chart.update(labels, rows);
  if (byId("table-box").open) showTable(labels, rows);
  const isEmpty = rows.every(({ counts }) => !Object.values(counts).some((value) => value > 0));
  setEmpty("chart-empty", isEmpty, stats.predictions ? `Nothing was classified in the last ${MINUTES} minutes.` : "Waiting for the first prediction.");
}

/** @param {string} id @param {boolean} isEmpty @param {string} words */
function setEmpty(id, isEmpty, words) {
  byId(id).hidden = !isEmpty;
  setText(byId(id), isEmpty ? words : "");
}

// --- trying a text

function showTextLength() {
  const length = [...byId("try-text").value].length;
  setText(byId("try-count"), format.count(length));
  byId("try-hint").classList.toggle("is-over", length > MAX_TEXT_CHARS);
  return length;
}

async function tryText() {
  const length = showTextLength();
  const text = byId("try-text").value;
  if (!text.trim()) return setTryError("Write a text first.");
  if (length > MAX_TEXT_CHARS) return setTryError(`The text has ${format.count(length)} characters; at most ${format.count(MAX_TEXT_CHARS)} are taken.`);
  const button = byId("try-button");
  if (button.getAttribute("aria-disabled") === "true") return undefined;
  setTryError("");
  button.setAttribute("aria-disabled", "true");
  try {
    const { prediction, elapsedMs } = await predict(text);
    showPrediction(prediction, elapsedMs);
  } catch (error) {
    explainFailedTry(toApiError(error));
  } finally {
    button.removeAttribute("aria-disabled");
  }
  return undefined;
}

/** @param {ApiError} error */
function explainFailedTry(error) {
  if (error.kind === "signed-out") {
    askForKey(SESSION_ENDED);
    return;
  }
  const words = {
    unreachable: "The server cannot be reached. Try again in a moment.",
    forbidden: "This key may not classify texts: it lacks the scope “predict”.",
    busy: error.code === "overloaded" || error.status === 429 ? "The server is overloaded. Try again in a moment." : "The server is not ready. Try again in a moment.",
  };
  const request = error.requestId ? ` (request ${error.requestId})` : "";
  setTryError(words[error.kind] ?? `${error.detail || "The server could not answer."}${request}`);
}

/** @param {string} message */
function setTryError(message) {
  setText(byId("try-error"), message);
  byId("try-text").setAttribute("aria-invalid", String(Boolean(message)));
  if (message) byId("try-result").hidden = true;
}

// --- what people do

/** @param {SubmitEvent} event */
async function onSignIn(event) {
  event.preventDefault();
  const field = byId("key");
  const key = field.value.trim();
  if (!key) return;
  setText(byId("sign-in-error"), "");
  try {
    await signIn(key);
  } catch (error) {
    setText(byId("sign-in-error"), explainFailedSignIn(toApiError(error)));
    field.focus();
    return;
  }
  field.value = "";
  state.failures = 0;
  setView("dashboard");
  setStatus("connecting", "Connecting");
  byId("main").focus({ preventScroll: true });
  schedule(0);
}

/** @param {ApiError} error */
function explainFailedSignIn(error) {
  if (error.kind === "forbidden") return LACKS_READ;
  if (error.kind === "signed-out" || error.kind === "refused") return "That key is not valid.";
  if (error.kind === "unreachable") return "The server cannot be reached. Try again in a moment.";
  return "The server cannot check keys now. Try again in a moment.";
}

async function onSignOut() {
  try {
    await signOut();
  } catch (error) {
    if (toApiError(error).kind !== "signed-out") {
      setBanner("Signing out did not reach the server: you are still signed in. Try again.");
      return;
    }
  }
  askForKey("");
}

function onShowKey() {
  const isShown = byId("key").type === "text";
  byId("key").type = isShown ? "password" : "text";
  byId("show-key").setAttribute("aria-pressed", String(!isShown));
}

function onPause() {
  state.isPaused = !state.isPaused;
  byId("pause").setAttribute("aria-pressed", String(state.isPaused));
  setText(byId("pause"), state.isPaused ? "Resume" : "Pause");
  if (!state.isPaused) schedule(0);
}

/** @param {boolean} isShare */
function onMode(isShare) {
  byId("mode-share").setAttribute("aria-pressed", String(isShare));
  byId("mode-count").setAttribute("aria-pressed", String(!isShare));
  chart.setShare(isShare);
}

function listen() {
  byId("sign-in-form").addEventListener("submit", onSignIn);
  byId("show-key").addEventListener("click", onShowKey);
  byId("sign-out").addEventListener("click", onSignOut);
  byId("pause").addEventListener("click", onPause);
  byId("mode-count").addEventListener("click", () => onMode(false));
  byId("mode-share").addEventListener("click", () => onMode(true));
  byId("table-box").addEventListener("toggle", () => byId("table-box").open && showTable(chart.labels, chart.rows));
  byId("try-text").addEventListener("input", showTextLength);
  byId("try-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) tryText();
  });
  byId("try-form").addEventListener("submit", (event) => {
    event.preventDefault();
    tryText();
  });
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      byId("try-text").value = chip.textContent;
      tryText();
    });
  }
  document.addEventListener("visibilitychange", () => document.hidden || schedule(0));
  window.addEventListener("online", () => schedule(0));
}

setText(byId("try-limit"), format.count(MAX_TEXT_CHARS));
listen();
tick();
