// Making elements. Text goes in as text nodes only, so that what a model or a person writes is never read as HTML.

export const $ = (id) => document.getElementById(id);

// An element with attributes (`onclick` and its like are listeners; true is a bare attribute, false and null are none).
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

// Shows an error (or takes it away) in the place that is kept for it.
export function tell(place, text) {
  place.textContent = text ?? "";
  place.hidden = !text;
}

export function typing(target) {
  return target instanceof Element && target.closest("input, textarea, select, [contenteditable]") !== null;
}

// A number of tokens, turns or tasks, with its noun.
export function count(n, noun) {
  return `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
}
