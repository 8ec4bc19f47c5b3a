"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const share = (part, whole) => (whole ? Math.round((100 * part) / whole) : 0) + " %";
let tokens = [];
let now = -1;

for (const [index, prompt] of data.prompts.entries()) {
  const name = [prompt.id, prompt.category !== prompt.id ? prompt.category : ""].filter(Boolean);
  at("prompt").add(new Option(`${index + 1}. ${name.join(" · ") || "prompt"}`, index));
}
for (const method of data.methods) at("method").add(new Option(method, method));
at("method").value = data.start.method;
at("prompt").value = data.start.prompt;

// Shown text keeps its blanks; a line break also gets a sign, so that its colour can be seen.
function fill(span, piece) {
  for (const part of piece.split(/(\n)/)) {
    if (part === "\n") span.append(make("span", "sign", "↵"));
    if (part) span.append(part);
  }
}

function describe(run, prompt, number, step, place, length) {
  const piece = JSON.stringify(prompt.texts[run.text][number]);
  const source = run.sources ? data.sources[run.sources[number]] : null;
  const origin = source ? `${source.name}: ${source.about}` : "origin not recorded";
  const where = run.steps ? `step ${step + 1}, ${place + 1} of ${length} tokens in it; ` : "";
  return `token ${number + 1} of ${prompt.texts[run.text].length} ${piece}: ${where}${origin}`;
}

function legend(run) {
  const list = at("legend");
  list.replaceChildren();
  if (!run.sources) {
    list.append(make("li", "faint", "This method does not record where its tokens came from."));
    return;
  }
  const counts = data.sources.map((_, i) => run.sources.filter((s) => s === i).length);
  for (const [index, source] of data.sources.entries()) {
    if (!counts[index]) continue;
    const item = make("li");
    item.title = source.about;
    item.append(make("span", "token " + source.style, source.name), ` ${counts[index]} (${share(counts[index], run.sources.length)})`);
    list.append(item);
  }
}

function show() {
  const prompt = data.prompts[Number(at("prompt").value)];
  const run = prompt.runs[at("method").value];
  const pieces = prompt.texts[run.text];
  at("ask").textContent = prompt.text;
  at("verdict").textContent = run.line;
  at("note").textContent = prompt.looping ? "This text repeats itself, which flatters methods that copy." : "";
  legend(run);
  const box = at("text");
  box.replaceChildren();
  tokens = [];
  now = -1;
  let number = 0;
  const lengths = run.steps || [pieces.length];
  for (const [step, length] of lengths.entries()) {
    const group = make("span", run.steps ? "step" : "");
    for (let place = 0; place < length && number < pieces.length; place += 1, number += 1) {
      const style = run.sources ? data.sources[run.sources[number]].style : "";
      const span = make("span", "token " + style);
      fill(span, pieces[number]);
      span.title = describe(run, prompt, number, step, place, length);
      span.dataset.number = number;
      tokens.push(span);
      group.append(span);
    }
    box.append(group);
  }
  at("detail").textContent = "Point at a token, or walk through them with the arrow keys.";
}

function point(number) {
  if (tokens[now]) tokens[now].classList.remove("now");
  now = Math.max(0, Math.min(tokens.length - 1, number));
  if (!tokens[now]) return;
  tokens[now].classList.add("now");
  at("detail").textContent = tokens[now].title;
}

at("prompt").addEventListener("change", show);
at("method").addEventListener("change", show);
at("text").addEventListener("pointerover", (event) => {
  const token = event.target.closest("[data-number]");
  if (token) point(Number(token.dataset.number));
});
at("text").addEventListener("keydown", (event) => {
  const moves = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tokens.length - 1 };
  if (!(event.key in moves)) return;
  event.preventDefault();
  point(moves[event.key]);
});
at("viewer").hidden = false;
show();
