// The form in which people choose an agent and what it is to do.

import { json } from "./api.js";
import { $, el, tell } from "./dom.js";
import { opening } from "./transcript.js";

const PAUSE_MS = 250; // between the last key and the look-up of a task

export class Setup {
  #envs = [];
  #timer = null;
  #previews = 0;

  // onStart(bodies): the sessions to make, as the API takes them. Raises what refuses them.
  constructor(onStart) {
    this.onStart = onStart;
    this.form = $("setup");
    this.form.addEventListener("change", () => this.#arrange());
    $("index").addEventListener("input", () => this.#previewSoon());
    $("another").addEventListener("click", () => this.#another());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start();
    });
  }

  // Ask the server what there is. What was chosen stays chosen.
  async load() {
    tell($("setup-error"), null);
    $("start").disabled = true;
    try {
      const [models, envs, releases] = await Promise.all([
        json("GET", "v1/models"),
        json("GET", "v1/envs"),
        json("GET", "v1/releases").catch(() => null), // it only says more about the versions
      ]);
      this.#fill(models.data.map(({ id }) => id), envs, releases);
      $("start").disabled = false;
    } catch (error) {
      this.#fail(error);
      $("setup-error").append(" ", el("button", { type: "button", onclick: () => this.load() }, "Try again"));
    }
  }

  #fill(models, { envs, tools }, releases) {
    const versions = models.filter((id) => id.includes("@"));
    const about = (id) => (id.includes("@") ? `${id}${described(id, releases)}` : `${id}, as released`);
    options($("model"), models.map((id) => [id, about(id)]));
    options($("other"), versions.map((id) => [id, about(id)]));
    options($("tools"), [["", "None"], ...tools.map((name) => [name, name])]);
    options($("env"), envs.map(({ name }) => [name, name]));
    this.#envs = envs;
    $("kind-task").disabled = !envs.length;
    $("compare").disabled = versions.length < 2;
    $("compare-why").textContent = versions.length < 2 ? "there is only one" : "";
    this.#arrange();
  }

  get #playsTask() {
    return $("kind-task").checked;
  }

  // How many tasks the split has; null: without end.
  get #tasks() {
    const env = this.#envs.find(({ name }) => name === $("env").value);
    return env?.tasks[$("split").value] ?? null;
  }

  #arrange() {
    $("free").hidden = this.#playsTask;
    $("task").hidden = !this.#playsTask;
    $("other-field").hidden = !$("compare").checked;
    const tasks = this.#tasks;
    $("index-range").textContent = tasks === null ? "" : `0 to ${tasks - 1}`;
    if (tasks === null) $("index").removeAttribute("max");
    else $("index").max = tasks - 1;
    this.#previewSoon();
  }

  #another() {
    $("index").value = Math.floor(Math.random() * (this.#tasks ?? 1_000_000));
    this.#previewSoon();
  }

  #previewSoon() {
    clearTimeout(this.#timer);
    if (this.#playsTask) this.#timer = setTimeout(() => this.#preview(), PAUSE_MS);
  }

  async #preview() {
    const asked = ++this.#previews;
    const query = new URLSearchParams({ split: $("split").value, index: $("index").value });
    let shown;
    try {
      const task = await json("GET", `v1/envs/${encodeURIComponent($("env").value)}/tasks?${query}`);
      shown = opening(task.messages);
    } catch (error) {
      shown = [el("p", { class: "error" }, error.message)];
    }
    if (asked === this.#previews) $("preview").replaceChildren(...shown);
  }

  async #start() {
    if ($("start").disabled) return;
    tell($("setup-error"), null);
    $("start").disabled = true;
    try {
      await this.onStart(this.#bodies());
    } catch (error) {
      this.#fail(error);
    } finally {
      $("start").disabled = false;
    }
  }

  #bodies() {
    const body = { model: $("model").value, collect: $("collect").checked };
    if (this.#playsTask) {
      body.env = $("env").value;
      body.task = { split: $("split").value, index: Number($("index").value) };
    } else {
      if ($("tools").value) body.tools = $("tools").value;
      if ($("system").value.trim()) body.system = $("system").value;
    }
    for (const name of ["temperature", "max_tokens", "seed"]) if ($(name).value) body[name] = Number($(name).value);
    if (!$("compare").checked) return [body];
    // The same seed, so that it is the weights that make the difference.
    body.seed ??= Math.floor(Math.random() * 2 ** 31);
    return [body, { ...body, model: $("other").value }];
  }

  // Said at the field that is wrong, where there is one.
  #fail(error) {
    for (const field of this.form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    tell($("setup-error"), error.message);
    const field = error.param && this.form.elements[error.param.split(".").at(-1)];
    if (!(field instanceof Element)) return;
    field.setAttribute("aria-invalid", "true");
    field.closest("details")?.setAttribute("open", "");
    field.focus();
  }
}

function options(select, pairs) {
  const chosen = select.value;
  select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, text)));
  if (pairs.some(([value]) => value === chosen)) select.value = chosen;
}

// " · step 1036 · 89 % success · stable"
function described(id, releases) {
  const version = Number(id.split("@")[1]);
  const release = releases?.versions.find((r) => r.version === version);
  if (!release) return "";
  const parts = [`step ${release.step}`];
  if (release.success !== null) parts.push(`${Math.round(release.success * 100)} % success`);
  if (releases.stable === version) parts.push("stable");
  if (releases.canary === version) parts.push("canary");
  return parts.map((part) => ` · ${part}`).join("");
}
