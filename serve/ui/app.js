// The chat page: a conversation, its settings, its history in this browser.

import { contestants, decide, drawDuel, isOpen, newDuel, take, wireArena } from "/ui/arena.js";
import { tell } from "/ui/feedback.js";
import {
  at, blind, bodyOf, button, element, modelOf, say, showSettings, state, store, stored, value, wireSettings,
} from "/ui/page.js";
import { draw, hear, isEmpty, newReply } from "/ui/replies.js";
import { call, Refused } from "/ui/stream.js";

// ---- conversations --------------------------------------------------------
// What was said before the message at `index`, as models read it.
function promptOf(chat, index, system) {
  const said = chat.messages.slice(0, index).map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

function keep() {
  state.chats = state.chats.filter((chat) => chat.messages.length);
  try {
    store("chats", state.chats.slice(0, 200));
  } catch {
    say("this browser's storage is full; delete some conversations");
  }
  showHistory();
}

function open(chat) {
  state.stop?.abort();
  state.current = chat;
  at("messages").replaceChildren(...chat.messages.map((_, index) => article(index)));
  scroll(true);
  showHistory();
  at("side").classList.remove("open");
  at("menu").setAttribute("aria-expanded", "false");
  at("prompt").focus();
}

function fresh() {
  const chat = { id: crypto.randomUUID(), title: "", messages: [] };
  state.chats.unshift(chat);
  open(chat);
}

function showHistory() {
  at("history").replaceChildren(...state.chats.filter((chat) => chat.messages.length).map((chat) => {
    const name = button(chat.title || "…", () => open(chat));
    name.setAttribute("aria-current", String(chat === state.current));
    const drop = button("✕", () => {
      state.chats = state.chats.filter((one) => one !== chat);
      keep();
      if (chat === state.current) fresh();
    }, `Delete ${chat.title}`);
    drop.className = "drop";
    const item = document.createElement("li");
    item.append(name, drop);
    return item;
  }));
}

// ---- messages -------------------------------------------------------------
function article(index) {
  const message = state.current.messages[index];
  const made = element("article", { className: message.duel ? "assistant duel" : message.role });
  made.setAttribute("aria-label", message.role === "user" ? "You said" : message.duel ? "Two replies" : "The reply");
  fill(made, message, index);
  return made;
}

function fill(made, message, index) {
  if (message.duel) {
    const last = index === state.current.messages.length - 1;
    const redraw = () => { fill(made, message, index); keep(); };
    drawDuel(made, message, {
      last,
      again: () => regenerate(index),
      take: (side) => { take(message, side); redraw(); made.querySelector("section.taken [aria-pressed]").focus(); },
      vote: async (winner, event) => {
        const group = event.target.parentElement;
        const open = [...group.querySelectorAll("button:enabled")];
        for (const one of open) one.disabled = true;
        if (await decide(message, promptOf(state.current, index, message.system), winner)) {
          redraw();
          scroll(true);
          if (event.detail === 0) at("prompt").focus();  // by keyboard: the conversation goes on
        } else for (const one of open) one.disabled = false;
      },
    });
    return;
  }
  if (message.role === "user") made.replaceChildren(element("div", { className: "body", textContent: message.content }));
  else draw(made, message);
  if (message.done || message.role === "user") made.append(tools(message, index));
}

function tools(message, index) {
  const row = document.createElement("div");
  row.className = "tools";
  row.append(button("Copy", () => navigator.clipboard.writeText(message.content), "Copy this message"));
  if (message.role === "user") {
    row.append(button("Edit", () => edit(index), "Edit this message and ask again"));
    return row;
  }
  row.append(button("Again", () => regenerate(index), "Replace this reply by another"));
  if (state.feedback) {
    for (const [words, label, good] of [["Good", "This is a good reply", true], ["Bad", "This is a bad reply", false]]) {
      const made = button(words, () => vote(index, good), label);
      made.setAttribute("aria-pressed", String(message.vote === good));
      row.append(made);
    }
    row.append(button("Correct", () => correct(index), "Write what the reply should have been"));
  }
  const about = [state.models.length > 1 && message.model, message.speed].filter(Boolean).join(" · ");
  if (about) row.append(element("span", { className: "hint", textContent: about }));
  return row;
}

function editor(index, words, done) {
  const made = at("messages").children[index];
  const area = document.createElement("textarea");
  Object.assign(area, { value: state.current.messages[index].content, rows: 5 });
  area.setAttribute("aria-label", words);
  const row = document.createElement("div");
  row.className = "tools";
  const back = () => fill(made, state.current.messages[index], index);
  row.append(button(words, () => done(area.value.trim())), button("Cancel", back));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") back();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done(area.value.trim());
  });
  made.replaceChildren(area, row);
  area.focus();
}

function edit(index) {
  editor(index, "Ask again", (text) => {
    if (!text) return;
    state.current.messages.length = index;
    open(state.current);
    ask(text);
  });
}

function regenerate(index) {
  state.current.messages.length = index;
  open(state.current);
  answer();
}

// ---- asking ---------------------------------------------------------------
function scroll(always) {
  const log = at("messages");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function ask(text) {
  const chat = state.current;
  const before = chat.messages.length - 1;
  chat.messages.push({ role: "user", content: text });
  chat.title ||= text.slice(0, 60);
  if (chat.messages[before]?.duel) fill(at("messages").children[before], chat.messages[before], before);
  at("messages").append(article(chat.messages.length - 1));
  answer();
}

async function answer() {
  const chat = state.current;
  const system = value("system").trim();
  const index = chat.messages.length;
  const prompt = promptOf(chat, index, system);
  const message = { role: "assistant", system };
  const asked = value("compare") ? contestants() : [state.chosen];
  Object.assign(message, value("compare") ? newDuel(asked) : newReply(state.chosen));
  chat.messages.push(message);
  const made = article(index);
  at("messages").append(made);
  at("messages").setAttribute("aria-busy", "true");
  scroll(true);
  const stop = new AbortController();
  state.stop = stop;
  at("send").textContent = "Stop";
  say("");
  let drawn = 0;
  const redraw = () => { drawn = 0; if (chat === state.current) { fill(made, message, index); scroll(false); } };
  const changed = (rate) => {
    if (!message.duel) at("rate").textContent = rate;
    drawn ||= requestAnimationFrame(redraw);
  };
  const replies = message.duel?.sides ?? [message];
  const ends = await Promise.allSettled(replies.map((one, n) => hear(one, bodyOf(prompt, one.model, n), stop.signal, changed)));
  cancelAnimationFrame(drawn);
  for (const { reason } of ends) {
    if (reason && reason.name !== "AbortError") say(reason instanceof Refused ? reason.message : "the server cannot be reached");
  }
  message.done = true;
  at("rate").textContent = message.speed ?? "";
  if (replies.every(isEmpty)) {
    chat.messages.splice(index, 1);
    made.remove();
  } else {
    // What was cut off cannot be judged.
    if (message.duel && ends.some(({ status }) => status === "rejected")) await decide(message, prompt, "none");
    else if (message.duel) say("both replies are there: which is better?", true);
    if (chat === state.current) fill(made, message, index);
  }
  if (state.stop === stop) {
    state.stop = null;
    at("send").textContent = "Send";
    at("messages").setAttribute("aria-busy", "false");
    scroll(false);
  }
  keep();
}

// ---- feedback -------------------------------------------------------------
async function vote(index, good) {
  const message = state.current.messages[index];
  const prompt = promptOf(state.current, index, message.system);
  if (await tell({ kind: "vote", model: message.model ?? state.chosen, prompt, reply: message.content, good })) {
    message.vote = good;
    fill(at("messages").children[index], message, index);
    keep();
  }
}

function correct(index) {
  const message = state.current.messages[index];
  const prompt = promptOf(state.current, index, message.system);
  editor(index, "Keep this correction", async (text) => {
    if (!text || text === message.content) return;
    if (await tell({ kind: "correction", model: message.model ?? state.chosen, prompt, reply: message.content, better: text })) {
      message.content = text;
      fill(at("messages").children[index], message, index);
      keep();
    }
  });
}

// ---- wiring ---------------------------------------------------------------
function theme(name) {
  document.documentElement.dataset.theme = name;
  store("theme", name);
}

function grow() {
  const area = at("prompt");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function wire() {
  at("compose").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.stop) { state.stop.abort(); return; }
    const text = at("prompt").value.trim();
    if (!text) return;
    if (isOpen(state.current.messages.at(-1))) {
      say("vote on the two replies first, or go on without a vote");
      return;
    }
    at("prompt").value = "";
    grow();
    ask(text);
  });
  at("prompt").addEventListener("input", grow);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!state.stop) at("compose").requestSubmit();
    } else if (event.key === "ArrowUp" && !at("prompt").value) {
      const last = state.current.messages.findLastIndex((one) => one.role === "user");
      if (last >= 0 && !state.stop) { event.preventDefault(); edit(last); }
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !at("ranking").open) state.stop?.abort();
    if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) { event.preventDefault(); fresh(); }
  });
  at("fresh").addEventListener("click", fresh);
  at("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  at("menu").addEventListener("click", () => {
    const shown = at("side").classList.toggle("open");
    at("menu").setAttribute("aria-expanded", String(shown));
  });
  at("forget").addEventListener("click", () => {
    if (!confirm("Delete all conversations from this browser?")) return;
    state.chats = [];
    keep();
    fresh();
  });
  wireSettings();
  wireArena();
  at("models").addEventListener("change", () => {
    state.chosen = value("models");
    store("model", state.chosen);
    showModel();
  });
  at("compare").addEventListener("change", () => { store("compare", value("compare")); showModel(); });
  at("key").addEventListener("change", () => { sessionStorage.setItem("qmax.key", value("key")); connect(); });
  at("consent").addEventListener("change", () => store("consent", value("consent")));
}

function showModel() {
  const choice = state.models.length > 1 && !blind();
  at("choice").hidden = !choice;
  at("model").hidden = choice;
  // Nothing names the two models before the vote.
  const option = ({ name }) => new Option(name, name, false, name === state.chosen);
  at("models").replaceChildren(...(choice ? state.models.map(option) : []));
  at("model").textContent = blind() ? "two at random" : state.chosen || "loading …";
  document.title = `${blind() ? "two replies" : state.chosen || "…"} · qmax`;
  const mayReply = blind() ? state.models : [modelOf(state.chosen)];
  at("enable_thinking").parentElement.hidden = !mayReply.some((one) => one.thinks);
  showSettings();
}

async function connect() {
  try {
    const { models, feedback } = await (await call("/ui/page.json", undefined, value("key"))).json();
    Object.assign(state, { models, feedback });
    const wanted = models.find((one) => one.name === stored("model", "")) ?? models[0];
    state.chosen = wanted?.name ?? "";
    at("feedback").hidden = at("rank").hidden = !feedback;
    showModel();
    if (!models.length) setTimeout(connect, 1500);
    else if (state.current?.messages.length) open(state.current);
  } catch {
    at("model").textContent = "the server cannot be reached";
    setTimeout(connect, 3000);
  }
}

theme(stored("theme", matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
// A reply that was coming when the page was left is not there.
const isWhole = (message) => message.role === "user" || message.done;
state.chats = stored("chats", []).map((chat) => ({ ...chat, messages: chat.messages.filter(isWhole) }));
at("key").value = sessionStorage.getItem("qmax.key") ?? "";
at("consent").checked = stored("consent", false);
at("compare").checked = stored("compare", false);
wire();
fresh();
connect();
