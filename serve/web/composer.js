// The message box, and the buttons that set the agent going and stop it. What it says goes to every pane.

import { $, tell } from "./dom.js";

const TALLEST_PX = 220;

export class Composer {
  #sent = null; // the text that is on its way

  // panes(): the sessions that it speaks to.
  constructor(panes) {
    this.panes = panes;
    this.box = $("message");
    this.box.addEventListener("input", () => this.#fit());
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    $("stop").addEventListener("click", () => this.stop());
  }

  // Bring the buttons up to date with the panes.
  show() {
    const panes = this.panes();
    const busy = panes.some((pane) => pane.busy);
    const goesOn = panes.some((pane) => pane.canGoOn);
    const task = panes.length > 0 && panes.every((pane) => pane.playsTask);
    $("composer").hidden = panes.length === 0 || !panes.some((pane) => pane.busy || pane.takesTurns);
    $("composer").classList.toggle("task", task);
    this.box.hidden = $("composer-hint").hidden = task;
    $("send").hidden = busy;
    $("send").textContent = task || (goesOn && !this.box.value.trim()) ? "Go on" : "Send";
    $("stop").hidden = !busy;
  }

  async submit() {
    const panes = this.panes();
    const content = this.box.hidden ? null : this.box.value;
    if (this.#sent !== null || panes.some((pane) => pane.busy)) return;
    const ready = panes.filter((pane) => (content?.trim() ? pane.takesTurns : pane.canGoOn));
    if (!ready.length) return;
    const body = { content: content?.trim() ? content : null };
    this.#sent = content ?? "";
    tell($("composer-error"), null);
    try {
      await this.#deliver(ready, body);
      this.#clear();
    } catch (error) {
      tell($("composer-error"), `${error.message}${content ? " Your message is still in the box." : ""}`);
    } finally {
      this.#sent = null;
      this.show();
    }
  }

  // Raises when no pane took it; where only some did, the others say so themselves.
  async #deliver(ready, body) {
    const results = await Promise.allSettled(ready.map((pane) => pane.send(body)));
    if (results.every(({ status }) => status === "rejected")) throw results[0].reason;
    results.forEach(({ status }, i) => status === "rejected" && ready[i].failed(body, results[i].reason));
  }

  stop() {
    for (const pane of this.panes()) if (pane.busy) pane.stop();
  }

  // A message that was thought lost turns out to have arrived.
  arrived(content) {
    if (this.#sent === null && this.box.value === content && !$("composer-error").hidden) this.#clear();
  }

  #clear() {
    this.box.value = "";
    tell($("composer-error"), null);
    this.#fit();
  }

  #fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(TALLEST_PX, this.box.scrollHeight + 2)}px`;
    this.show();
  }
}
