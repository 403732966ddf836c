// One session on the page: its record, its state, and what can be done with it.

import { button, count, el, tell } from "./dom.js";
import { Session } from "./session.js";
import { Transcript } from "./transcript.js";

const AT_BOTTOM_PX = 80;

export class Pane {
  #countdown = null;

  // onChange(): something that the rest of the page shows has changed; onUser(content): the person has said so;
  // say: see Transcript.
  constructor(info, { onChange, onUser, say }) {
    this.busy = info.status === "running";
    this.over = info.status === "done" || info.status === "failed";
    this.gone = false;
    this.unanswered = false;
    this.onChange = onChange;
    this.onUser = onUser;
    this.session = new Session(info, { onEvent: (event) => this.#take(event), onLink: (link) => this.#link(link) });
    const quiet = info.seq; // what had happened before is shown, but not read out
    this.transcript = new Transcript({
      collect: info.collect,
      acts: {
        retry: (turn) => this.send({ content: null, retry: true, turn }),
        feedback: (body) => this.session.feedback(body),
      },
      say: (...words) => this.session.seq > quiet && say(...words),
    });
    this.state = el("span", { class: "state", role: "status" });
    this.link = el("p", { class: "link", role: "status", hidden: true });
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.version = el("span", { class: "chip" }, `v${info.version}`);
    const task = info.task ?? { split: "held_out", index: 0 };
    const about = info.env ? `${info.env} · ${task.split.replace("_", " ")} ${task.index}` : (info.tools ?? "");
    this.root = el(
      "section",
      { class: "pane", tabindex: "0", "aria-label": `Session with ${this.title}` },
      el(
        "header",
        { class: "pane-head" },
        el("h2", {}, info.model, this.version),
        el("span", { class: "about" }, about),
        info.collect ? el("span", { class: "about" }, "kept for training") : null,
        this.state,
      ),
      this.transcript.root,
      this.link,
      this.error,
    );
    this.#showState();
  }

  get title() {
    const { model, version } = this.session.info;
    return `${model}@${version}`;
  }

  get id() {
    return this.session.info.id;
  }

  get playsTask() {
    return Boolean(this.session.info.env);
  }

  get takesTurns() {
    return !this.busy && !this.over && !this.gone;
  }

  // Whether the agent has something to do without anybody's words.
  get canGoOn() {
    return this.takesTurns && (this.playsTask || this.unanswered);
  }

  // Raises what refuses it.
  async send(body) {
    tell(this.error, null);
    await this.session.turn({ stream: true, ...body });
  }

  // What could not be sent, and is in no box to send from: what went wrong, and a way to try again.
  failed(body, error) {
    tell(this.error, `It was not sent. ${error.message} `);
    const again = () => this.send(body).catch((next) => this.failed(body, next));
    this.error.append(button("Send again", again));
  }

  follow() {
    return this.session.follow();
  }

  async stop() {
    tell(this.error, null);
    try {
      await this.session.stop();
    } catch (error) {
      tell(this.error, `It was not stopped. ${error.message}`);
    }
  }

  close() {
    clearInterval(this.#countdown);
    this.session.close();
    this.root.remove();
  }

  #take(event) {
    const follows = this.#atBottom();
    this.transcript.show(event);
    if (event.type === "user") {
      this.unanswered = true;
      tell(this.error, null); // it has arrived, whatever was feared
      this.onUser(event.content);
    }
    if (event.type === "version") this.version.textContent = `v${event.to}`;
    if (event.type === "retry") this.unanswered = true;
    if (event.type === "turn") this.unanswered = !event.asks;
    if (["user", "turn_start", "retry"].includes(event.type)) this.#set(true, false);
    if (["waiting", "stopped"].includes(event.type)) this.#set(false, false);
    if (event.type === "done") this.#set(false, true);
    if (event.type === "error") this.#set(false, !event.resume);
    if (follows) this.#toBottom();
  }

  #link(link) {
    clearInterval(this.#countdown);
    this.link.hidden = link.state !== "lost";
    if (link.state === "rest") {
      this.transcript.settle("not finished");
      this.#set(false, this.over);
    }
    if (link.state === "gone") {
      this.gone = true;
      tell(this.error, link.message);
      this.#set(false, this.over);
    }
    if (link.state === "lost") this.#countDown(link.waitS);
  }

  #countDown(waitS) {
    const until = performance.now() + waitS * 1000;
    const left = el("span", {});
    const show = () => (left.textContent = count(Math.max(0, Math.ceil((until - performance.now()) / 1000)), "second"));
    show();
    this.#countdown = setInterval(show, 1000);
    const words = el("span", {}, "The connection is lost. Trying again in ", left, ".");
    this.link.replaceChildren(words, button("Try now", this.session.tryNow));
  }

  #set(busy, over) {
    [this.busy, this.over] = [busy, over];
    this.#showState();
    this.onChange();
  }

  #showState() {
    const [name, words] = this.gone
      ? ["over", "Gone"]
      : this.busy
        ? ["busy", "Answering"]
        : this.over
          ? ["over", "Over"]
          : ["ready", "Ready"];
    this.state.className = `state ${name}`;
    this.state.textContent = words;
    this.root.setAttribute("aria-busy", String(this.busy));
    for (const acts of this.root.querySelectorAll(".acts")) acts.inert = this.busy;
  }

  // What scrolls: the pane itself, or the whole page where the panes are stacked.
  get #scroller() {
    return this.root.scrollHeight > this.root.clientHeight + 1 ? this.root : this.root.closest("main");
  }

  #atBottom() {
    const box = this.#scroller;
    return box !== null && box.scrollHeight - box.scrollTop - box.clientHeight < AT_BOTTOM_PX;
  }

  #toBottom() {
    const box = this.#scroller;
    box?.scrollTo({ top: box.scrollHeight });
  }
}
