// One turn of the agent as people see it: what it says as it says it, its tool calls, what they gave, and its reward.

import { button, count, el, tell } from "./dom.js";

let forms = 0;

const CALL = /<tool_call>[\s\S]*?(<\/tool_call>|$)/g;

export function badge(reward) {
  const shown = Number(reward.toFixed(3)).toLocaleString("en", { signDisplay: "exceptZero" });
  const sign = reward > 0 ? "good" : reward < 0 ? "bad" : "none";
  return el("span", { class: `badge ${sign}` }, `reward ${shown}`);
}

// JSON on one line where it is short, else indented. A line's end inside a string is escaped in either.
function readable(data) {
  const indented = JSON.stringify(data, null, 2);
  const line = indented.replace(/(?<=[{[])\n *|\n *(?=[}\]])/g, "").replace(/\n */g, " ");
  return line.length <= 60 ? line : indented;
}

// A card with a title (nodes and texts) and readable data: text as it is, anything else as JSON.
export function card(kind, title, data) {
  const text = typeof data === "string" ? data : readable(data);
  return el("div", { class: `card ${kind}` }, el("p", { class: "card-title" }, ...title), el("pre", {}, text));
}

export class TurnView {
  #chunks = [];
  #correctionForm = null;

  // acts: {retry(turn), feedback({turn, rating, correction})}, each a promise; `collect`: whether it may be rated.
  constructor({ turn, version }, { collect, acts }) {
    this.turn = turn;
    this.acts = acts;
    this.text = "";
    this.rating = null;
    this.correction = null;
    this.finished = false;
    this.version = el("span", { class: "chip" }, `v${version}`);
    this.marks = el("span", { class: "marks" });
    this.raw = el("div", { class: "said raw" });
    this.prose = el("div", { class: "said prose", hidden: true });
    this.tokens = el("ol", { class: "token-ids", "aria-label": "Tokens" });
    this.cards = el("div", { class: "cards" });
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.up = button("↑ Good", () => this.rate("up"), { "aria-pressed": "false", class: "act rate" });
    this.down = button("↓ Bad", () => this.rate("down"), { "aria-pressed": "false", class: "act rate" });
    this.correct = button("Correct", () => this.openCorrection(), { "aria-expanded": "false", class: "act" });
    this.retry = button("Retry", () => this.again(), { class: "act retry", title: "Sample this turn again" });
    const rating = collect ? [this.up, this.down, this.correct] : [];
    this.actions = el("div", { class: "acts", hidden: true, inert: true }, ...rating, this.retry);
    this.root = el(
      "article",
      { class: "turn busy", tabindex: "-1", "aria-label": `Turn ${turn + 1} of the agent, version ${version}` },
      el("header", { class: "turn-head" }, el("span", { class: "who" }, `Turn ${turn + 1}`), this.version, this.marks),
      this.raw,
      this.prose,
      this.tokens,
      this.cards,
      this.actions,
      this.error,
    );
    this.root.view = this;
  }

  say({ text, token_ids }) {
    this.text += text;
    const chunk = el("span", { class: "chunk", title: `${count(token_ids.length, "token")}: ${token_ids.join(" ")}` }, text);
    this.#chunks.push(text);
    this.raw.classList.toggle("calling", this.text.trimStart().startsWith("<tool_call>"));
    this.raw.append(chunk);
  }

  // The turn as it stands in the journal, which may be cut shorter than what was streamed.
  finish({ text, token_ids, logprobs, versions, finish_reason }) {
    this.finished = true;
    this.root.classList.remove("busy");
    this.root.classList.add("finished");
    this.text = text;
    if (this.#chunks.join("") !== text) this.raw.replaceChildren(el("span", { class: "chunk" }, text));
    if (!text) this.raw.replaceChildren(el("span", { class: "nothing" }, "(nothing said)"));
    this.version.textContent = [...new Set(versions)].map((v) => `v${v}`).join(" → ") || this.version.textContent;
    if (finish_reason === "length") this.mark("cut at the token limit");
    this.tokens.append(...token_ids.map((id, i) => token(id, logprobs[i])));
    this.actions.hidden = false;
  }

  call({ name, arguments: given }) {
    const prose = this.text.replace(CALL, "").trim();
    this.prose.textContent = prose;
    this.prose.hidden = !prose;
    this.root.classList.add("calls");
    this.cards.append(card("call", ["Calls", el("code", { class: "tool" }, name)], given));
  }

  observe({ messages, flags }) {
    for (const message of messages) {
      const title = message.role === "tool" ? "Result" : "Environment";
      this.cards.append(card("seen", [title], message.content));
    }
    for (const flag of flags) this.mark(flag.replaceAll("_", " "));
  }

  reward(reward) {
    this.marks.append(badge(reward));
  }

  mark(text) {
    this.marks.append(el("span", { class: "badge none" }, text));
  }

  // It ended before it was whole: it is not part of the conversation.
  cutOff(why) {
    if (this.finished || !this.root.classList.contains("busy")) return;
    this.root.classList.remove("busy");
    this.root.classList.add("dropped");
    this.mark(why);
  }

  // Another attempt stands in its place: nothing can be done with this one.
  retire() {
    this.root.classList.remove("busy");
    this.root.removeAttribute("tabindex");
    this.actions.remove();
    this.#correctionForm?.remove();
    this.error.remove();
  }

  rated({ rating, correction }) {
    this.rating = rating ?? null;
    this.correction = correction ?? null;
    this.up.setAttribute("aria-pressed", String(this.rating === "up"));
    this.down.setAttribute("aria-pressed", String(this.rating === "down"));
    this.correct.textContent = this.correction === null ? "Correct" : "Corrected";
  }

  // Whether that can be done now; the keyboard asks too.
  #open(act) {
    return act.isConnected && !this.actions.hidden && !this.actions.inert;
  }

  async rate(rating) {
    if (!this.#open(this.up)) return;
    await this.#feedback({ rating: this.rating === rating ? null : rating, correction: this.correction });
  }

  async again() {
    if (!this.#open(this.retry)) return;
    await this.#attempt(() => this.acts.retry(this.turn));
  }

  openCorrection() {
    if (!this.#open(this.correct)) return;
    if (!this.#correctionForm) this.root.append((this.#correctionForm = this.#makeCorrectionForm()));
    this.correct.setAttribute("aria-expanded", "true");
    this.#correctionForm.querySelector("textarea").focus();
  }

  #makeCorrectionForm() {
    const id = `correction-${++forms}`;
    const box = el("textarea", { id, rows: "4" });
    box.value = this.correction ?? this.text;
    const form = el(
      "form",
      { class: "correction" },
      el("label", { for: id }, "What it should have said"),
      box,
      el("div", { class: "actions" }, button("Cancel", () => close()), el("button", { class: "primary" }, "Save correction")),
    );
    const close = () => {
      form.remove();
      this.#correctionForm = null;
      this.correct.setAttribute("aria-expanded", "false");
      this.root.focus();
    };
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      close();
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (await this.#feedback({ rating: this.rating, correction: box.value })) close();
    });
    return form;
  }

  #feedback(feedback) {
    return this.#attempt(async () => {
      await this.acts.feedback({ turn: this.turn, ...feedback });
      this.rated(feedback);
    });
  }

  // Whether it went well; what went wrong is said at the turn.
  async #attempt(act) {
    tell(this.error, null);
    try {
      await act();
      return true;
    } catch (error) {
      tell(this.error, error.message);
      return false;
    }
  }
}

function token(id, logprob) {
  if (logprob === undefined) return el("li", {}, String(id));
  const probability = Math.exp(logprob);
  const class_ = probability < 0.1 ? "rare" : probability < 0.6 ? "open" : "sure";
  return el("li", { class: class_, title: `token ${id}, probability ${probability.toPrecision(2)}` }, String(id));
}
