// The server's endpoints as functions. Every failure is an ApiError whose `kind` says what the page should do.

const TIMEOUT_MS = 10_000;

/** @typedef {"signed-out" | "forbidden" | "busy" | "unreachable" | "refused" | "failed"} FailureKind */

export class ApiError extends Error {
  /**
   * @param {FailureKind} kind
   * @param {{status?: number, code?: string, detail?: string, requestId?: string, retryAfterS?: number}} [about]
   */
  constructor(kind, about = {}) {
    super(about.detail || kind);
    this.name = "ApiError";
    this.kind = kind;
    this.status = about.status ?? 0;
    this.code = about.code ?? "";
    this.detail = about.detail ?? "";
    this.requestId = about.requestId ?? "";
    this.retryAfterS = about.retryAfterS ?? 0;
  }
}

/** @param {number} status @returns {FailureKind} */
function kindOf(status) {
  if (status === 401) return "signed-out";
  if (status === 403) return "forbidden";
  if (status === 429 || status === 503) return "busy";
  if (status === 502 || status === 504) return "unreachable";
  return status < 500 ? "refused" : "failed";
}

/** @param {Response} response */
async function toError(response) {
  const problem = await response.json().catch(() => ({}));
  const retryAfterS = Number(response.headers.get("Retry-After"));
  return new ApiError(kindOf(response.status), {
    status: response.status,
    code: problem.code,
    detail: problem.detail || problem.title,
    requestId: response.headers.get("X-Request-ID") || problem.request_id,
    retryAfterS: Number.isFinite(retryAfterS) ? retryAfterS : 0,
  });
}

/** @param {string} method @param {string} path @param {unknown} [body] */
async function call(method, path, body) {
  const options = { method, credentials: "same-origin", cache: "no-store", headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, { ...options, signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch {
    throw new ApiError("unreachable");
  }
  if (!response.ok) throw await toError(response);
  return response;
}

/** @param {Response} response */
async function parse(response) {
  try {
    return await response.json();
  } catch {
    throw new ApiError("unreachable");
  }
}

/** Resolves to whether this browser is signed in. */
export async function isSignedIn() {
  try {
    await call("GET", "/session");
    return true;
  } catch (error) {
    if (error instanceof ApiError && error.kind === "signed-out") return false;
    throw error;
  }
}

/** @param {string} key */
export async function signIn(key) {
  await call("POST", "/session", { key });
}

export async function signOut() {
  await call("DELETE", "/session");
}

/**
 * The live figures, with the server's clock: the chart's minutes must not depend on how this device's clock is set.
 * @param {number} minutes @param {number} newest
 */
export async function getStats(minutes, newest) {
  const response = await call("GET", `/stats?minutes=${minutes}&newest=${newest}`);
  const serverMs = Date.parse(response.headers.get("Date") ?? "");
  return { stats: await parse(response), nowMs: Number.isNaN(serverMs) ? Date.now() : serverMs };
}

/** @param {string} text */
export async function predict(text) {
  const started = performance.now();
  const prediction = await parse(await call("POST", "/predict", { text }));
  return { prediction, elapsedMs: performance.now() - started };
}
