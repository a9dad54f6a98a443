// Two replies side by side, whose models are named after the vote; the ranking that the votes make.

import { tell } from "/ui/feedback.js";
import { at, button, element, state, value } from "/ui/page.js";
import { draw, isEmpty, newReply } from "/ui/replies.js";
import { call } from "/ui/stream.js";

const SIDES = ["A", "B"];
const VERDICTS = [["a", "A is better"], ["b", "B is better"], ["tie", "Equally good"], ["both_bad", "Both bad"]];
const SAID = {
  a: "You found A better.",
  b: "You found B better.",
  tie: "You found both good.",
  both_bad: "You found both bad.",
  none: "No vote.",
};

// ---- a duel ---------------------------------------------------------------
// Who replies as A and as B: two models drawn at random, in random order, or the only one twice.
export function contestants() {
  const names = state.models.map((one) => one.name);
  if (names.length < 2) return [state.chosen, state.chosen];
  for (let last = names.length - 1; last > 0; last -= 1) {
    const other = Math.floor(Math.random() * (last + 1));
    [names[last], names[other]] = [names[other], names[last]];
  }
  return names.slice(0, 2);
}

// `winner` is null until the vote; `taken` is the side from which the conversation goes on.
export const newDuel = (names) => ({ content: "", done: false, duel: { sides: names.map(newReply), winner: null, taken: null } });

export const isOpen = (message) => Boolean(message?.duel) && message.duel.winner === null;

export function take(message, side) {
  const { content, model } = message.duel.sides[side];
  message.duel.taken = side;
  Object.assign(message, { content, model });
}

// Ends a duel. A vote is kept first, where votes are kept; false if that could not be.
export async function decide(message, prompt, winner) {
  const { duel } = message;
  if (winner !== "none" && state.feedback) {
    const [a, b] = duel.sides.map(({ model, content }) => ({ model, reply: content }));
    if (!(await tell({ kind: "arena", prompt, a, b, winner }))) return false;
  }
  duel.winner = winner;
  take(message, winner === "b" || (winner !== "a" && isEmpty(duel.sides[0])) ? 1 : 0);
  return true;
}

function names({ duel }) {
  const [a, b] = duel.sides.map((one) => one.model);
  return a === b ? `Both were ${a}.` : `A was ${a}, B was ${b}.`;
}

// acts: vote(winner, event), take(side), again(), and whether this is the conversation's `last` message.
export function drawDuel(made, message, acts) {
  const { sides, winner, taken } = message.duel;
  if (!made.querySelector(".sides")) {
    const boxes = SIDES.map((name) => {
      const parts = ["said", "tools"].map((className) => element("div", { className }));
      const box = element("section", {}, element("h3"), ...parts);
      box.setAttribute("aria-label", `Reply ${name}`);
      return box;
    });
    made.replaceChildren(element("div", { className: "sides" }, ...boxes), element("div", { className: "verdict" }));
  }
  sides.forEach((side, n) => {
    const box = made.querySelectorAll(".sides > section")[n];
    box.classList.toggle("taken", taken === n);
    box.querySelector("h3").textContent = winner === null ? SIDES[n] : `${SIDES[n]} · ${side.model}`;
    draw(box.querySelector(".said"), side);
    box.querySelector(".tools").replaceChildren(...(message.done ? tools(message, n, acts) : []));
  });
  const verdict = made.querySelector(".verdict");
  verdict.replaceChildren();
  if (message.done) verdict.append(...(winner === null ? votes(message, acts) : outcome(message, acts)));
}

const hint = (name, textContent) => element(name, { className: "hint", textContent });

function tools({ duel }, n, acts) {
  const side = duel.sides[n];
  const row = [button("Copy", () => navigator.clipboard.writeText(side.content), `Copy reply ${SIDES[n]}`)];
  if (duel.winner === null) return row;
  if (acts.last && !isEmpty(side)) {
    const made = button("Go on from this", () => acts.take(n), `Go on from reply ${SIDES[n]}`);
    made.setAttribute("aria-pressed", String(duel.taken === n));
    row.push(made);
  } else if (duel.taken === n) row.push(hint("span", "the conversation went on from here"));
  if (side.speed) row.push(hint("span", side.speed));
  return row;
}

function votes({ duel }, acts) {
  const same = duel.sides[0].content === duel.sides[1].content;
  const group = element("div", { className: "votes" });
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "Which reply is better?");
  for (const [winner, words] of VERDICTS) {
    const made = button(words, (event) => acts.vote(winner, event));
    const side = ["a", "b"].indexOf(winner);
    made.disabled = side >= 0 && (same || !duel.sides[side].content);
    group.append(made);
  }
  const words = state.models.length > 1 ? "Show the models without a vote" : "No vote";
  const none = button(words, (event) => acts.vote("none", event));
  none.className = "quiet";
  group.append(none);
  return same ? [hint("p", "Both replies are the same; a higher temperature makes them differ."), group] : [group];
}

function outcome(message, acts) {
  const made = element("p", { className: "outcome", textContent: `${SAID[message.duel.winner]} ${names(message)}` });
  if (acts.last) made.append(" ", button("Again", acts.again, "Ask for two other replies"));
  return [made];
}

// ---- the ranking ----------------------------------------------------------
const SCALE = "A model that is 100 points ahead wins 64 of 100 votes; the mean is 1000.";
const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, one] of Object.entries(attributes)) made.setAttribute(key, one);
  return made;
}

// The interval as a line, the rating as a dot on it, the mean of all as a fine line behind them.
function drawn({ rating, low, high }, place) {
  const made = shape("svg", { class: "interval", "aria-hidden": "true" });
  const line = (from, to, more) => shape("line", { x1: place(from), x2: place(to), ...more });
  made.append(
    line(1000, 1000, { y1: "0", y2: "100%", class: "mean" }),
    line(low, high, { y1: "50%", y2: "50%" }),
    shape("circle", { cx: place(rating), cy: "50%", r: "4.5" }),
  );
  return made;
}

function table(models) {
  const lowest = Math.min(1000, ...models.map((one) => one.low));
  const highest = Math.max(1000, ...models.map((one) => one.high));
  const place = (rating) => `${(4 + (92 * (rating - lowest)) / (highest - lowest || 1)).toFixed(2)}%`;
  const row = (kind, ...cells) => element("tr", {}, ...cells.map((cell, n) => {
    const made = element(n ? kind : "th", {}, cell);
    if (kind === "th" || !n) made.scope = kind === "th" ? "col" : "row";
    return made;
  }));
  const body = models.map((one) => {
    const ends = hint("span", `${one.low.toFixed(0)} to ${one.high.toFixed(0)}`);
    const interval = element("td", {}, drawn(one, place), ends);
    const made = row("td", one.model, one.rating.toFixed(0), "", String(one.votes));
    made.children[2].replaceWith(interval);
    made.children[3].title = `${one.wins} won, ${one.losses} lost, ${one.ties} even`;
    return made;
  });
  return element("table", {},
    element("thead", {}, row("th", "Model", "Rating", "95 % interval", "Votes")), element("tbody", {}, ...body));
}

async function showRanking() {
  const words = (text) => element("p", { textContent: text });
  at("standings").replaceChildren(words("loading …"));
  at("ranking").showModal();
  try {
    const { models, votes } = await (await call("/v1/arena", undefined, value("key"))).json();
    at("standings").replaceChildren(...(models.length
      ? [table(models), hint("p", `${votes} votes. ${SCALE}`)]
      : [words("No two models have been compared yet.")]));
  } catch (error) {
    at("standings").replaceChildren(words(error.message));
  }
}

export function wireArena() {
  at("rank").addEventListener("click", showRanking);
  at("ranking-close").addEventListener("click", () => at("ranking").close());
}

