// Markdown as nodes. Text never becomes HTML, so nothing that a model writes can run.

const element = (name, ...children) => {
  const made = document.createElement(name);
  made.append(...children);
  return made;
};

const INLINE = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(.+?)\*\*|(?<!\*)\*(?!\s)([^*]+?)\*(?!\*)|~~(.+?)~~|\[([^\]]+)\]\((https?:[^)\s]+)\)|(https?:\/\/[^\s<>)"']+[^\s<>)"'.,;:!?])/g;

export function inline(text) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, found.index));
    const [whole, , code, bold, italic, struck, label, target, bare] = found;
    if (code !== undefined) nodes.push(element("code", code));
    else if (bold) nodes.push(element("strong", ...inline(bold)));
    else if (italic) nodes.push(element("em", ...inline(italic)));
    else if (struck) nodes.push(element("s", ...inline(struck)));
    else {
      const link = element("a", label ?? bare);
      Object.assign(link, { href: target ?? bare, target: "_blank", rel: "noopener noreferrer nofollow" });
      nodes.push(link);
    }
    at = found.index + whole.length;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

function codeBlock(text, language) {
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", "Copy this code");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  const code = element("code", text);
  if (language) code.dataset.language = language;
  const block = element("div", element("pre", code), copy);
  block.className = "block";
  return block;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const [head, , ...rows] = lines;
  const row = (kind, line) => element("tr", ...cells(line).map((cell) => element(kind, ...inline(cell))));
  return element("table", element("thead", row("th", head)), element("tbody", ...rows.map((line) => row("td", line))));
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function list(lines) {
  const ordered = /\d/.test(lines[0].match(ITEM)[2]);
  const made = document.createElement(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(lines[0].match(ITEM)[2], 10);
  const indent = lines[0].match(ITEM)[1].length;
  let inner = [];
  const close = () => {
    if (inner.length) made.lastChild.append(...blocks(inner.join("\n")));
    inner = [];
  };
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent) {
      close();
      made.append(element("li", ...inline(item[3])));
    } else inner.push(line.slice(Math.min(indent + 2, line.length - line.trimStart().length)));
  }
  close();
  return made;
}

function blocks(text) {
  const lines = text.split("\n");
  const made = [];
  let at = 0;
  const take = (more) => {
    const start = at;
    while (at < lines.length && more(lines[at], at - start)) at += 1;
    return lines.slice(start, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(/^\s*(```+|~~~+)\s*([\w+#.-]*)/);
    const heading = line.match(/^(#{1,6})\s+(.*)$/);
    if (!line.trim()) at += 1;
    else if (fence) {
      at += 1;
      const body = take((one) => !one.trim().startsWith(fence[1]));
      at += 1;
      made.push(codeBlock(body.join("\n"), fence[2]));
    } else if (heading) {
      made.push(element(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2])));
      at += 1;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      made.push(document.createElement("hr"));
      at += 1;
    } else if (line.startsWith(">")) {
      made.push(element("blockquote", ...blocks(take((one) => one.startsWith(">")).map((one) => one.replace(/^>\s?/, "")).join("\n"))));
    } else if (ITEM.test(line)) {
      made.push(list(take((one, n) => n === 0 || ITEM.test(one) || /^\s+\S/.test(one))));
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] ?? "")) {
      made.push(table(take((one) => one.includes("|"))));
    } else {
      const body = take((one, n) => n === 0 || (one.trim() && !/^(\s*(```|~~~)|#{1,6}\s|>)/.test(one) && !ITEM.test(one)));
      const nodes = body.flatMap((one, n) => (n ? [document.createElement("br"), ...inline(one)] : inline(one)));
      made.push(element("p", ...nodes));
    }
  }
  return made;
}

export function render(target, text) {
  target.replaceChildren(...blocks(text));
}
