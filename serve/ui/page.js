// What the parts of the page share: its state, its settings, small pieces.

export const at = (id) => document.getElementById(id);
export const stored = (name, other) => JSON.parse(localStorage.getItem(`qmax.${name}`) ?? "null") ?? other;
export const store = (name, value) => localStorage.setItem(`qmax.${name}`, JSON.stringify(value));

// Of each model: its name, its defaults, and whether it thinks. `chosen` is the name of the one that replies.
export const state = { models: [], chosen: "", feedback: false, chats: [], current: null, stop: null };

export const modelOf = (name) => state.models.find((one) => one.name === name) ?? { name, defaults: {}, thinks: false };

// Whether two models that stay unnamed reply, instead of the one that was chosen.
export const blind = () => value("compare") && state.models.length > 1;

export function say(words, calm = false) {
  at("note").textContent = words;
  at("note").classList.toggle("calm", calm);
}

export function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function button(words, act, label) {
  const made = element("button", { type: "button", textContent: words });
  if (label) { made.title = label; made.setAttribute("aria-label", label); }
  made.addEventListener("click", act);
  return made;
}

// ---- settings -------------------------------------------------------------
export const SETTINGS = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed", "enable_thinking"];

const field = (name) => at(name);
export const value = (name) => (field(name).type === "checkbox" ? field(name).checked : field(name).value);

export function showSettings() {
  const settings = stored("settings", {});
  for (const name of SETTINGS) {
    const theirs = blind() && settings[name] === undefined;  // each of the two has its own
    const own = settings[name] ?? modelOf(state.chosen).defaults[name];
    if (field(name).type === "checkbox") field(name).checked = own ?? true;
    else field(name).value = theirs && field(name).type === "number" ? "" : own ?? "";
    const shown = document.querySelector(`output[for="${name}"]`);
    if (shown) shown.value = theirs ? "each model's own" : field(name).value;
  }
}

export function wireSettings() {
  at("defaults").addEventListener("click", () => { store("settings", {}); showSettings(); });
  for (const name of SETTINGS) {
    field(name).addEventListener("input", () => {
      store("settings", { ...stored("settings", {}), [name]: value(name) });
      const shown = document.querySelector(`output[for="${name}"]`);
      if (shown) shown.value = value(name);
    });
  }
}

// A request for a reply of the model of this name; the replies of one request differ by `number`.
export function bodyOf(messages, name, number = 0) {
  const { defaults, thinks } = modelOf(name);
  const settings = stored("settings", {});
  const body = { model: name, messages };
  for (const one of ["temperature", "top_p", "top_k", "seed"]) {
    const wanted = settings[one] ?? defaults[one] ?? "";
    if (wanted !== "") body[one] = Number(wanted);
  }
  if (body.seed !== undefined) body.seed += number;
  if (settings.max_tokens) body.max_completion_tokens = Number(settings.max_tokens);
  if (thinks) body.enable_thinking = settings.enable_thinking ?? defaults.enable_thinking ?? true;
  return body;
}
