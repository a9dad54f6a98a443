// One reply: heard as it comes, drawn as it is so far.

import { render } from "/ui/markdown.js";
import { element, value } from "/ui/page.js";
import { reply } from "/ui/stream.js";

export const newReply = (model) => ({ model, content: "", thought: "", calls: [], done: false });

export const isEmpty = (one) => !one.content && !one.thought && !one.calls.length;

// Fills `into` with what the server sends; `changed` is called after each piece, with the rate so far.
export async function hear(into, body, signal, changed) {
  const began = performance.now();
  let first = 0, pieces = 0, usage = null;
  try {
    for await (const piece of reply(body, value("key"), signal)) {
      usage = piece.usage ?? usage;
      const delta = piece.choices[0]?.delta;
      if (!delta) continue;
      into.thought += delta.reasoning_content ?? "";
      into.content += delta.content ?? "";
      for (const one of delta.tool_calls ?? []) into.calls.push(one.function);
      if (delta.content || delta.reasoning_content) { pieces += 1; first ||= performance.now(); }
      const seconds = (performance.now() - first) / 1000;
      changed(first && seconds > 0.1 ? `${(pieces / seconds).toFixed(0)} pieces/s` : "");
    }
  } finally {
    into.done = true;
  }
  if (usage && first) {
    const seconds = (performance.now() - first) / 1000;
    const rate = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    into.speed = `${usage.completion_tokens} tokens${rate}, first after ${((first - began) / 1000).toFixed(2)} s`;
  }
}

function folded(title, inner) {
  return element("details", {}, element("summary", { textContent: title }), inner);
}

export function draw(target, one) {
  const parts = [];
  if (one.thought) {
    const inner = element("div", { className: "body" });
    render(inner, one.thought);
    const details = folded(one.content || one.done ? "Thoughts" : "Thinking …", inner);
    details.open = target.dataset.open === "true";
    details.addEventListener("toggle", () => { target.dataset.open = String(details.open); });
    parts.push(details);
  }
  for (const call of one.calls ?? []) parts.push(folded(`Calls ${call.name}`, element("pre", { textContent: call.arguments })));
  const body = element("div", { className: one.done ? "body" : "body caret" });
  render(body, one.content);
  target.replaceChildren(...parts, body);
}
