// What is read out to who listens instead of looking: whole sentences, and not every piece of one as it is sampled.

import { $ } from "./dom.js";

const KEPT = 20; // lines; a live region that only grows would be read from the start by some readers

// say(piece): a piece of a text that goes on; say(null, line): what has piled up, and then a line of its own.
export function listener() {
  let pending = "";
  const put = (text) => {
    if (!text.trim()) return;
    const line = document.createElement("p");
    line.textContent = text;
    $("live").append(line);
    while ($("live").children.length > KEPT) $("live").firstChild.remove();
  };
  return (piece, line = "") => {
    if (piece !== null) {
      pending += piece;
      const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => pending.lastIndexOf(mark) + 1));
      put(pending.slice(0, end));
      pending = pending.slice(end);
      return;
    }
    put(pending);
    put(line);
    pending = "";
  };
}
