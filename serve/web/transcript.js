// A session's events, one after the other, as a readable record of what happened.

import { count, el } from "./dom.js";
import { TurnView, badge, card } from "./turn.js";

const ENDS = {
  done: "The task is over",
  max_turns: "No turns are left",
  max_tokens: "The context is full",
};

const STOPS = {
  disconnected: "stopped: the connection was lost",
  closed: "stopped: the server was ending",
};

function message(who, text, kind) {
  return el("div", { class: `message ${kind}` }, el("p", { class: "who" }, who), el("div", { class: "said" }, text));
}

// The opening messages of a task or a conversation; also what the preview of a task shows.
export function opening(messages) {
  return messages.map(({ role, content }) =>
    role === "system"
      ? el("details", { class: "system" }, el("summary", {}, "System text"), el("div", { class: "said" }, content))
      : message(role === "user" ? "Task" : role, content, "task"),
  );
}

function toolList(tools) {
  const lines = tools.map(({ function: { name, description, parameters } }) =>
    card("seen", [el("code", { class: "tool" }, name), description ?? ""], parameters ?? {}),
  );
  return el("details", { class: "system" }, el("summary", {}, count(tools.length, "tool")), ...lines);
}

export class Transcript {
  #turns = new Map(); // of each number the newest attempt

  // say(text): for who listens instead of looking.
  constructor({ collect, acts, say }) {
    this.options = { collect, acts };
    this.say = say;
    this.root = el("div", { class: "transcript" });
  }

  show(event) {
    this[`_${event.type}`]?.(event);
  }

  // No turn is under way: one that is not whole never will be.
  settle(why) {
    for (const view of this.#turns.values()) view.cutOff(why);
  }

  _prompt({ messages, tools }) {
    this.root.prepend(...opening(messages), ...(tools.length ? [toolList(tools)] : []));
  }

  _user({ content }) {
    this.root.append(message("You", content, "user"));
  }

  _turn_start(event) {
    this.#turns.get(event.turn)?.cutOff("not finished");
    const view = new TurnView(event, this.options);
    this.#turns.set(event.turn, view);
    this.root.append(view.root);
    this.say(null, `Turn ${event.turn + 1}.`);
  }

  _tokens(event) {
    this.#turns.get(event.turn)?.say(event);
    this.say(event.text);
  }

  _turn(event) {
    if (!this.#turns.has(event.turn)) this._turn_start({ ...event, version: event.versions[0] });
    this.#turns.get(event.turn).finish(event);
    this.say(null);
  }

  _tool_call(event) {
    this.#turns.get(event.turn).call(event);
    this.say(null, `Calls ${event.name}.`);
  }

  _observation(event) {
    this.#turns.get(event.turn).observe(event);
    this.say(null, event.messages.map(({ content }) => `Result: ${content}.`).join(" "));
  }

  _reward({ turn, reward }) {
    if (reward === 0) return; // most turns' own: what the whole is worth is said at its end
    this.#turns.get(turn).reward(reward);
    this.say(null, `Reward ${reward}.`);
  }

  _waiting() {
    this.settle("not finished");
    this.say(null);
  }

  _stopped({ reason }) {
    this.settle(STOPS[reason] ?? "stopped");
    this.say(null, "Stopped.");
  }

  _done({ stop_reason, reward, success }) {
    this.settle("not finished");
    const words = ENDS[stop_reason] ?? "Over";
    const marks = reward === null ? [] : [badge(reward)];
    if (success !== undefined) marks.push(el("span", { class: `badge ${success ? "good" : "none"}` }, success ? "solved" : "not solved"));
    this.root.append(el("p", { class: "end" }, words, el("code", { class: "chip", title: "Stop reason" }, stop_reason), ...marks));
    this.say(null, [words, ...marks.map((mark) => mark.textContent)].join(", "));
  }

  _version({ from, to, reason }) {
    this.root.append(el("p", { class: "note" }, `Version ${to} answers from here on, not version ${from}: ${reason}`));
  }

  _error({ code, message: text, resume }) {
    this.settle("cut off");
    const after = resume ? " The session can go on." : "";
    this.root.append(el("p", { class: "error" }, `${text}${after} `, el("code", {}, code)));
    this.say(null, `Error: ${text}`);
  }

  _feedback({ turn, rating, correction }) {
    this.#turns.get(turn)?.rated({ rating, correction });
  }

  // From this turn on it is sampled again: what stood there is folded away.
  _retry({ turn }) {
    const first = this.#turns.get(turn);
    if (!first) return;
    const replaced = [];
    for (let node = first.root; node; node = node.nextSibling) replaced.push(node);
    for (const [number, view] of this.#turns) {
      if (number < turn) continue;
      view.retire();
      this.#turns.delete(number);
    }
    const fold = el("details", { class: "earlier" }, el("summary", {}, "An earlier attempt"));
    fold.append(...replaced);
    this.root.append(fold);
  }
}
