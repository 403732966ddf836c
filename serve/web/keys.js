// The keyboard, outside of what browsers do by themselves. The help dialog in index.html lists it.

import { $, typing } from "./dom.js";

const TURN = ".turn[tabindex]";

// acts: {stop()}
export function listenToKeys({ stop }) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") {
      stop();
      if (typing(event.target)) event.target.blur();
      return;
    }
    if (typing(event.target)) return;
    if (act(event.key, event.target.closest?.(TURN))) event.preventDefault();
  });
}

function act(key, turn) {
  if (key === "?") return $("help").showModal() ?? true;
  if (key === "j" || (turn && key === "ArrowDown")) return move(turn, 1);
  if (key === "k" || (turn && key === "ArrowUp")) return move(turn, -1);
  if (key === "/") {
    $("message").focus();
    return true;
  }
  const view = turn?.view;
  if (!view) return false;
  if (key === "u") view.rate("up");
  else if (key === "d") view.rate("down");
  else if (key === "c") view.openCorrection();
  else if (key === "r") view.again();
  else return false;
  return true;
}

// To the next turn, or to the last one when none has the focus.
function move(turn, by) {
  const turns = [...document.querySelectorAll(`.transcript > ${TURN}`)];
  const at = turns.indexOf(turn);
  const next = at < 0 ? turns.at(-1) : turns[at + by];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
  return true;
}
