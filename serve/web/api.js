// Requests to the server: its errors as words, and its key.

const KEY = "repertory-key";
const OF_SESSION = /^v1\/sessions\/([^/?]+)/; // as it stands in the path: a header takes no other letters

// The server said no. `param` names the field that is wrong.
export class Refused extends Error {
  constructor(status, { message, code, param } = {}, retryAfter = null) {
    super(message || `The server answered with status ${status}.`);
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfterS = retryAfter === null ? null : Number(retryAfter) || null;
  }

  // Whether the same request may well be answered later.
  get passing() {
    return this.status === 429 || this.status === 408 || this.status >= 500;
  }
}

// No answer came. Whether the request arrived is not known.
export class Unreachable extends Error {
  constructor() {
    super("The server cannot be reached.");
  }
}

let asking = null;
let ask = async () => null;

// `asker(message)` gets a key from the person, or null. message: what was wrong with the last one.
export function askForKeysWith(asker) {
  ask = asker;
}

// The response, once it is a good one. A 401 asks for a key and tries again.
export async function request(method, path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const session = OF_SESSION.exec(path); // of several replicas, the one that holds it is to answer
    if (session) headers["x-session-id"] = session[1];
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Unreachable();
    }
    if (response.ok) return response;
    const answer = await response.json().catch(() => ({}));
    const refused = new Refused(response.status, answer.error, response.headers.get("Retry-After"));
    if (response.status !== 401) throw refused;
    if (sessionStorage.getItem(KEY) !== key) continue; // another request has been given a key meanwhile
    asking ??= ask(key && refused.message).finally(() => (asking = null));
    const given = await asking;
    if (given === null) throw refused;
    sessionStorage.setItem(KEY, given);
  }
}

export async function json(method, path, body) {
  const response = await request(method, path, { body });
  return response.status === 204 ? null : response.json();
}
