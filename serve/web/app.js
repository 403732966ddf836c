// The page: which of its two states it is in (choosing, talking), and what its address says.

import { askForKeysWith, json } from "./api.js";
import { Composer } from "./composer.js";
import { $, tell } from "./dom.js";
import { listenToKeys } from "./keys.js";
import { listener } from "./listener.js";
import { Pane } from "./pane.js";
import { Setup } from "./setup.js";

let panes = [];
const composer = new Composer(() => panes);
const setup = new Setup(start);

const address = () => location.hash.slice(1).split(",").filter(Boolean).map(decodeURIComponent);
const shown = () => panes.map((pane) => pane.id);

// -- the two states ---------------------------------------------------------------------------------------------------

function choose(notice = null) {
  leave();
  tell($("notice"), notice);
  document.title = "Repertory";
  $("setup").hidden = false;
  $("panes").hidden = $("new").hidden = $("delete").hidden = true;
  $("bar").classList.remove("talking");
  composer.show();
  setup.load();
  $("main").scrollTop = 0;
}

function talk(infos) {
  leave();
  tell($("notice"), null);
  panes = infos.map((info) => {
    const say = listener();
    return new Pane(info, { onChange: () => composer.show(), onUser: (text) => composer.arrived(text), say });
  });
  $("setup").hidden = true;
  $("panes").hidden = $("new").hidden = $("delete").hidden = false;
  $("bar").classList.add("talking");
  $("panes").classList.toggle("two", panes.length > 1);
  $("panes").append(...panes.map((pane) => pane.root));
  document.title = `${panes.map((pane) => pane.title).join(" and ")} · Repertory`;
  composer.show();
  ($("message").hidden ? $("main") : $("message")).focus();
}

function leave() {
  for (const pane of panes) pane.close();
  panes = [];
  tell($("composer-error"), null);
  $("live").replaceChildren();
}

// -- sessions ---------------------------------------------------------------------------------------------------------

// Make the sessions; a task is begun at once. Raises what refuses them, and then leaves none behind.
async function start(bodies) {
  const made = [];
  try {
    for (const body of bodies) made.push(await json("POST", "v1/sessions", body));
  } catch (error) {
    for (const { id } of made) await json("DELETE", `v1/sessions/${id}`).catch(() => {});
    throw error;
  }
  talk(made);
  location.hash = shown().map(encodeURIComponent).join(",");
  const begun = panes;
  await Promise.all(begun.map((pane) => pane.follow()));
  for (const pane of begun) {
    if (pane.playsTask) pane.send({ content: null }).catch((error) => pane.failed({ content: null }, error));
  }
}

// Show the sessions that the address names, from their beginning and on.
async function resume() {
  const ids = address();
  if (!ids.length) return choose();
  try {
    talk(await Promise.all(ids.map((id) => json("GET", `v1/sessions/${encodeURIComponent(id)}`))));
    for (const pane of panes) pane.follow();
  } catch (error) {
    choose(`The session in this page's address cannot be shown. ${error.message}`);
  }
}

async function remove() {
  tell($("sure-error"), null);
  try {
    for (const pane of panes) await pane.session.remove();
    $("sure").close();
    history.replaceState(null, "", location.pathname);
    choose(panes.length > 1 ? "The sessions are deleted." : "The session is deleted.");
  } catch (error) {
    tell($("sure-error"), error.message);
  }
}

// -- the API key ------------------------------------------------------------------------------------------------------

function askForKey(wrong) {
  tell($("key-error"), wrong);
  $("key-value").value = "";
  $("key").showModal();
  return new Promise((resolve) => {
    $("key").onclose = () => resolve($("key").returnValue === "given" ? $("key-value").value.trim() : null);
    $("key").returnValue = "";
  });
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("key-value").value.trim()) $("key").close("given");
});
$("key-cancel").addEventListener("click", () => $("key").close());
askForKeysWith(askForKey);

// -- what is there from the start -------------------------------------------------------------------------------------

$("new").addEventListener("click", () => (location.hash = ""));
$("delete").addEventListener("click", () => $("sure").showModal());
$("sure-yes").addEventListener("click", remove);
$("help-open").addEventListener("click", () => $("help").showModal());
$("show-tokens").addEventListener("change", (event) => document.body.classList.toggle("tokens", event.target.checked));
window.addEventListener("hashchange", () => {
  if (address().join() !== shown().join()) resume();
});
listenToKeys({ stop: () => composer.stop() });
document.body.classList.toggle("tokens", $("show-tokens").checked);
resume();
