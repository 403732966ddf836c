// Server-sent events from a fetch, which unlike EventSource can carry an Authorization header.

// Takes the stream's text in any pieces and gives its events: {type, data, id}.
export class Parser {
  #rest = "";
  #type = "";
  #data = [];
  #id = "";

  *push(text) {
    // A carriage return at the very end may be the first half of a line's end: it waits for what follows.
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) yield { type: this.#type || "message", data: this.#data.join("\n"), id: this.#id };
        this.#type = "";
        this.#data = [];
        continue;
      }
      const colon = line.indexOf(":");
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "event") this.#type = value;
      else if (field === "data") this.#data.push(value);
      else if (field === "id") this.#id = value;
    }
  }
}

// A response's events. A connection that breaks ends them, as its end does.
export async function* events(body) {
  const parser = new Parser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const next = () => reader.read().catch(() => ({ done: true }));
  try {
    for (let piece = await next(); !piece.done; piece = await next()) yield* parser.push(piece.value);
  } finally {
    reader.cancel().catch(() => {}); // one that broke cannot be cancelled, and need not be
  }
}
