// The chat page: a conversation, its settings, its history in this browser.

import { render } from "/ui/markdown.js";
import { call, Refused, reply } from "/ui/stream.js";

const at = (id) => document.getElementById(id);
const stored = (name, other) => JSON.parse(localStorage.getItem(`qmax.${name}`) ?? "null") ?? other;
const store = (name, value) => localStorage.setItem(`qmax.${name}`, JSON.stringify(value));

const SETTINGS = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed", "enable_thinking"];
const state = {
  page: { model: "", defaults: {}, feedback: false, thinks: false },
  chats: stored("chats", []),
  current: null,
  stop: null,
  editing: null,
};

// ---- settings -------------------------------------------------------------
const field = (name) => at(name);
const value = (name) => (field(name).type === "checkbox" ? field(name).checked : field(name).value);

function showSettings(settings) {
  for (const name of SETTINGS) {
    const own = settings[name] ?? state.page.defaults[name];
    if (field(name).type === "checkbox") field(name).checked = own ?? true;
    else field(name).value = own ?? "";
    const shown = document.querySelector(`output[for="${name}"]`);
    if (shown) shown.value = field(name).value;
  }
}

function bodyOf(messages) {
  const body = { model: state.page.model, messages };
  for (const name of ["temperature", "top_p", "top_k", "seed"]) {
    if (value(name) !== "") body[name] = Number(value(name));
  }
  if (value("max_tokens") !== "") body.max_completion_tokens = Number(value("max_tokens"));
  if (state.page.thinks) body.enable_thinking = value("enable_thinking");
  if (value("system").trim()) body.messages = [{ role: "system", content: value("system") }, ...messages];
  return body;
}

// ---- conversations --------------------------------------------------------
const messagesOf = (chat) => chat.messages.map(({ role, content }) => ({ role, content }));

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
  state.editing = null;
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
function button(words, act, label) {
  const made = document.createElement("button");
  Object.assign(made, { type: "button", textContent: words });
  if (label) { made.title = label; made.setAttribute("aria-label", label); }
  made.addEventListener("click", act);
  return made;
}

function article(index) {
  const message = state.current.messages[index];
  const made = document.createElement("article");
  made.className = message.role;
  made.setAttribute("aria-label", message.role === "user" ? "You said" : "The reply");
  fill(made, message, index);
  return made;
}

function fill(made, message, index) {
  const body = document.createElement("div");
  body.className = "body";
  made.replaceChildren();
  if (message.role === "user") body.textContent = message.content;
  else {
    if (message.thought) {
      const details = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = message.content || message.done ? "Thoughts" : "Thinking …";
      const inner = document.createElement("div");
      inner.className = "body";
      render(inner, message.thought);
      details.append(summary, inner);
      details.open = made.dataset.open === "true";
      details.addEventListener("toggle", () => { made.dataset.open = String(details.open); });
      made.append(details);
    }
    render(body, message.content);
    for (const one of message.calls ?? []) {
      const details = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = `Calls ${one.name}`;
      const code = document.createElement("pre");
      code.textContent = one.arguments;
      details.append(summary, code);
      made.append(details);
    }
    if (!message.done) body.classList.add("caret");
  }
  made.append(body);
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
  if (state.page.feedback) {
    for (const [words, label, good] of [["Good", "This is a good reply", true], ["Bad", "This is a bad reply", false]]) {
      const made = button(words, () => vote(index, good), label);
      made.setAttribute("aria-pressed", String(message.vote === good));
      row.append(made);
    }
    row.append(button("Correct", () => correct(index), "Write what the reply should have been"));
  }
  if (message.speed) row.append(Object.assign(document.createElement("span"), { className: "hint", textContent: message.speed }));
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
function say(words) { at("note").textContent = words; }

function scroll(always) {
  const log = at("messages");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function ask(text) {
  const chat = state.current;
  chat.messages.push({ role: "user", content: text });
  chat.title ||= text.slice(0, 60);
  at("messages").append(article(chat.messages.length - 1));
  answer();
}

async function answer() {
  const chat = state.current;
  const asked = bodyOf(messagesOf(chat));
  const message = { role: "assistant", content: "", thought: "", calls: [], done: false };
  const index = chat.messages.push(message) - 1;
  const made = article(index);
  at("messages").append(made);
  at("messages").setAttribute("aria-busy", "true");
  scroll(true);
  const stop = new AbortController();
  state.stop = stop;
  at("send").textContent = "Stop";
  say("");
  const began = performance.now();
  let first = 0, pieces = 0, usage = null, drawn = 0;
  const draw = () => { drawn = 0; if (chat === state.current) { fill(made, message, index); scroll(false); } };
  try {
    for await (const piece of reply(asked, value("key"), stop.signal)) {
      usage = piece.usage ?? usage;
      const delta = piece.choices[0]?.delta;
      if (!delta) continue;
      message.thought += delta.reasoning_content ?? "";
      message.content += delta.content ?? "";
      for (const one of delta.tool_calls ?? []) message.calls.push(one.function);
      if (delta.content || delta.reasoning_content) { pieces += 1; first ||= performance.now(); }
      const seconds = (performance.now() - first) / 1000;
      if (pieces > 4) at("rate").textContent = `${(pieces / seconds).toFixed(0)} pieces/s`;
      drawn ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error instanceof Refused ? error.message : "the server cannot be reached");
  }
  if (usage && first) {
    const seconds = (performance.now() - first) / 1000;
    const rate = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    message.speed = `${usage.completion_tokens} tokens${rate}, first after ${((first - began) / 1000).toFixed(2)} s`;
    at("rate").textContent = message.speed;
  }
  message.done = true;
  if (!message.content && !message.thought && !message.calls.length) {
    chat.messages.splice(index, 1);
    made.remove();
  } else if (chat === state.current) fill(made, message, index);
  if (state.stop === stop) {
    state.stop = null;
    at("send").textContent = "Send";
    at("messages").setAttribute("aria-busy", "false");
  }
  keep();
}

// ---- feedback -------------------------------------------------------------
async function tell(row) {
  if (!value("consent")) {
    say("agree first, under Feedback at the side, that it is kept");
    at("side").classList.add("open");
    at("consent").focus();
    return false;
  }
  try {
    await call("/v1/feedback", { consent: true, model: state.page.model, ...row }, value("key"));
    say("");
    return true;
  } catch (error) {
    say(error.message);
    return false;
  }
}

async function vote(index, good) {
  const message = state.current.messages[index];
  const before = bodyOf(messagesOf(state.current).slice(0, index)).messages;
  if (await tell({ kind: "vote", prompt: before, reply: message.content, good })) {
    message.vote = good;
    fill(at("messages").children[index], message, index);
    keep();
  }
}

function correct(index) {
  const message = state.current.messages[index];
  const before = bodyOf(messagesOf(state.current).slice(0, index)).messages;
  editor(index, "Keep this correction", async (text) => {
    if (!text || text === message.content) return;
    if (await tell({ kind: "correction", prompt: before, reply: message.content, better: text })) {
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
    if (event.key === "Escape") state.stop?.abort();
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
  at("defaults").addEventListener("click", () => { store("settings", {}); showSettings({}); });
  for (const name of SETTINGS) {
    field(name).addEventListener("input", () => {
      store("settings", { ...stored("settings", {}), [name]: value(name) });
      const shown = document.querySelector(`output[for="${name}"]`);
      if (shown) shown.value = value(name);
    });
  }
  at("key").addEventListener("change", () => { sessionStorage.setItem("qmax.key", value("key")); connect(); });
  at("consent").addEventListener("change", () => store("consent", value("consent")));
}

async function connect() {
  try {
    const { models, feedback } = await (await call("/ui/page.json", undefined, value("key"))).json();
    const { name = "", defaults = {}, thinks = false } = models[0] ?? {};
    state.page = { ready: models.length > 0, model: name, defaults, feedback, thinks };
    at("model").textContent = state.page.ready ? state.page.model : "loading …";
    document.title = `${state.page.model || "…"} · qmax`;
    at("feedback").hidden = !state.page.feedback;
    at("enable_thinking").parentElement.hidden = !state.page.thinks;
    showSettings(stored("settings", {}));
    if (!state.page.ready) setTimeout(connect, 1500);
    else if (state.current?.messages.length) open(state.current);
  } catch {
    at("model").textContent = "the server cannot be reached";
    setTimeout(connect, 3000);
  }
}

theme(stored("theme", matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
at("key").value = sessionStorage.getItem("qmax.key") ?? "";
at("consent").checked = stored("consent", false);
wire();
fresh();
connect();
