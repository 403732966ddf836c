// One session of the server: its events in order, each once, over as many connections as that takes.

import { Refused, Unreachable, json, request } from "./api.js";
import { events } from "./sse.js";

const FIRST_WAIT_S = 0.5;
const LONGEST_WAIT_S = 15;
const RESTING = new Set(["created", "waiting", "done", "error", "stopped", "feedback"]); // the last of a session at rest

export class Session {
  #reading = null; // of the connection that is open
  #following = null;
  #wake = () => {};

  // onEvent(event); onLink(link): {state: "live" | "rest"}, {state: "lost", waitS} or {state: "gone", message}.
  constructor(info, { onEvent, onLink }) {
    this.info = info;
    this.seq = -1;
    this.closed = false;
    this.onEvent = onEvent;
    this.onLink = onLink;
    this.tryNow = () => this.#wake();
    this.offline = () => this.#reading?.abort();
    window.addEventListener("online", this.tryNow);
    window.addEventListener("offline", this.offline);
  }

  get path() {
    return `v1/sessions/${encodeURIComponent(this.info.id)}`;
  }

  close() {
    this.closed = true;
    this.#reading?.abort();
    this.#wake();
    window.removeEventListener("online", this.tryNow);
    window.removeEventListener("offline", this.offline);
  }

  // Returns when the server has taken the turn; its events come through onEvent. Raises what refuses it.
  async turn(body) {
    this.#reading = new AbortController();
    let response;
    try {
      response = await request("POST", `${this.path}/turns`, { body, signal: this.#reading.signal });
    } catch (error) {
      // Without an answer it may have arrived all the same; and a turn under way is another tab's. The journal knows.
      if (!(error instanceof Refused) || error.code === "turn_under_way") this.follow();
      throw error.name === "AbortError" ? new Unreachable() : error;
    }
    this.#goOn(response);
  }

  async #goOn(response) {
    try {
      if (await this.#read(response)) return;
    } catch (error) {
      if (!(error instanceof Unreachable || error instanceof Refused)) throw error; // what was missed did not come
    }
    this.follow();
  }

  stop() {
    return json("POST", `${this.path}/stop`);
  }

  feedback(body) {
    return json("POST", `${this.path}/feedback`, body);
  }

  async remove() {
    try {
      await json("DELETE", this.path);
    } catch (error) {
      if (error.status !== 404) throw error; // it is gone already
    }
  }

  // Reads what has happened since the last event, and on until the session rests.
  follow() {
    return (this.#following ??= this.#follow().finally(() => (this.#following = null)));
  }

  async #follow() {
    let waitS = FIRST_WAIT_S;
    while (!this.closed) {
      const before = this.seq;
      let after = null;
      try {
        this.#reading = new AbortController();
        const since = this.seq < 0 ? "" : `?after=${this.seq}`;
        const response = await request("GET", `${this.path}/events${since}`, { signal: this.#reading.signal });
        if (await this.#read(response)) return;
        this.info = await json("GET", this.path);
        if (this.info.status !== "running") return this.onLink({ state: "rest" });
      } catch (error) {
        const refused = error instanceof Refused;
        if (refused && !error.passing) return this.onLink({ state: "gone", message: error.message });
        if (!(refused || error instanceof Unreachable || error.name === "AbortError")) throw error;
        after = error.retryAfterS;
      }
      if (this.seq !== before) waitS = FIRST_WAIT_S;
      if (!this.closed) await this.#wait(after ?? waitS * (0.75 + Math.random() / 2));
      waitS = Math.min(LONGEST_WAIT_S, waitS * 2);
    }
  }

  // Whether the events ended with one after which the session rests. A broken connection is an end as well.
  async #read(response) {
    let last = null;
    this.onLink({ state: "live" });
    for await (const { type, data, id } of events(response.body)) {
      const event = { ...JSON.parse(data), type, seq: Number(id) };
      if (this.closed) return true;
      if (event.error) return false; // not of the session: the way to it broke, behind a connection that holds
      if (event.seq > this.seq + 1) await this.#fill(event.seq);
      if (event.seq !== this.seq + 1) continue; // known, from another connection
      this.#take(event);
      last = event.type;
    }
    if (RESTING.has(last)) this.onLink({ state: "rest" });
    return RESTING.has(last);
  }

  #take(event) {
    this.seq = event.seq;
    this.onEvent(event);
  }

  // What another tab has done before the event `seq`, and ratings, which no turn's stream carries.
  async #fill(seq) {
    const { events: missed } = await json("GET", `${this.path}/events?stream=false&after=${this.seq}`);
    for (const event of missed) if (event.seq === this.seq + 1 && event.seq < seq) this.#take(event);
  }

  #wait(seconds) {
    this.onLink({ state: "lost", waitS: seconds });
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, seconds * 1000);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
