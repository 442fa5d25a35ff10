"use strict";

const LETTERS = ["A", "B", "C", "D"];
const $ = (id) => document.getElementById(id);

/** An element with a class and children; strings become text, so nothing that a model wrote is markup. */
function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

let reasons = [];
let items = [];
let reviewer = "";
let at = 0;
let busy = false;
let finished = false;

async function call(route, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(route, options);
  } catch {
    throw new Error("the review server does not answer; is the command still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `status ${response.status}`);
  return answer;
}

function problem(text) {
  $("problem").textContent = text || "";
  $("problem").hidden = !text;
}

/** What the item reads now: with the reviewer's edit, if there is one. */
function text(item) {
  return item.verdict && item.verdict.verdict === "edit" ? item.verdict : item.written;
}

function options(list, written) {
  list.replaceChildren(...written.choices.map((choice, n) =>
    make("li", n === written.answer ? "right" : "", make("b", "", LETTERS[n]), make("span", "", choice))));
}

function source(item, n) {
  const { domain, subject, question, choices, answer } = item.sources[n];
  const list = make("ol", "options");
  options(list, { choices, answer });
  const about = subject ? ` · ${subject.replaceAll("_", " ")}` : "";
  return make("section", "source",
    make("h2", "", domain.replaceAll("_", " "), make("span", "note", about)),
    make("p", "", question), list,
    make("p", "note", make("b", "", "Knowledge: "), item.knowledge[n]));
}

function state(verdict) {
  if (!verdict) return "";
  if (verdict.verdict === "accept") return "accepted";
  if (verdict.verdict === "edit") return "accepted with edits";
  return `rejected: ${reasons.find((r) => r.id === verdict.reason).label}`;
}

function count(kind) {
  return items.filter((i) => i.verdict && i.verdict.verdict === kind).length;
}

const ACTIONS = () => [
  { key: "a", name: "Accept", className: "accept", chosen: (v) => v.verdict === "accept", run: () => decide({ verdict: "accept" }) },
  ...reasons.map((reason, n) => ({
    key: String(n + 1),
    name: reason.label[0].toUpperCase() + reason.label.slice(1),
    className: "reject",
    chosen: (v) => v.reason === reason.id,
    run: () => decide({ verdict: "reject", reason: reason.id }),
  })),
  { key: "e", name: "Edit", className: "", chosen: (v) => v.verdict === "edit", run: edit },
  { key: "u", name: "Undo", className: "", chosen: () => false, idle: (v) => !v, run: () => items[at].verdict && decide({ verdict: "undo" }) },
];

const MOVES = [
  { keys: ["ArrowRight", "j"], name: "next item", run: () => go(at + 1) },
  { keys: ["ArrowLeft", "k"], name: "item before", run: () => go(at - 1) },
  { keys: ["n"], name: "next undecided item", run: () => go(undecided(at + 1)) },
  { keys: ["h"], name: "hide or show the answers", run: () => document.body.classList.toggle("hide-answers") },
  { keys: ["?"], name: "these keys", run: () => $("help").showModal() },
];

function show() {
  const item = items[at];
  const written = text(item);
  const decided = items.filter((i) => i.verdict).length;
  $("position").textContent = `${at + 1} of ${items.length}`;
  $("counts").textContent =
    `${decided} decided by ${reviewer}: ${count("accept")} accepted, ${count("edit")} edited, ${count("reject")} rejected`;
  $("progress").value = decided;
  $("progress").max = items.length;
  $("domains").textContent = `${item.domains.map((d) => d.replaceAll("_", " ")).join(" + ")} · ${item.id}`;
  $("state").textContent = state(item.verdict);
  $("state").className = item.verdict && item.verdict.verdict === "reject" ? "rejected" : "";
  $("question-text").textContent = written.question;
  options($("options"), written);
  $("explanation").replaceChildren(...(item.explanation ? [make("b", "", "Because: "), item.explanation] : []));
  $("sources").replaceChildren(source(item, 0), source(item, 1));
  const usable = ACTIONS().filter((action) => !(action.idle && action.idle(item.verdict)));
  $("actions").replaceChildren(...usable.map((action) => {
    const chosen = item.verdict ? action.chosen(item.verdict) : false;
    const button = make("button", `${action.className}${chosen ? " chosen" : ""}`, `${action.name} `, make("kbd", "", action.key));
    button.type = "button";
    button.setAttribute("aria-pressed", String(chosen));
    button.addEventListener("click", action.run);
    return button;
  }));
  leaveEditing();
}

function go(to) {
  if (to === null || to < 0 || to >= items.length) return;
  at = to;
  show();
  window.scrollTo(0, 0);
}

/** The first undecided item from `from` on and round; none if all are decided. */
function undecided(from) {
  for (let n = 0; n < items.length; n += 1) {
    const place = (from + n) % items.length;
    if (!items[place].verdict) return place;
  }
  return null;
}

/** Sends a decision; the page goes on only when it is on the disk. */
async function decide(verdict) {
  if (busy) return;
  busy = true;
  const item = items[at];
  try {
    await call("decisions", { item: item.id, sha256: item.sha256, ...verdict });
    problem("");
    item.verdict = verdict.verdict === "undo" ? null : verdict;
    const next = item.verdict ? undecided(at + 1) : at;
    if (next === null) show();
    else go(next);
  } catch (error) {
    problem(`Not saved: ${error.message}.`);
  } finally {
    busy = false;
  }
}

function edit() {
  const written = text(items[at]);
  $("edit-question").value = written.question;
  $("edit-options").replaceChildren(make("legend", "", "Options; the mark is at the right one"), ...LETTERS.map((letter, n) => {
    const mark = make("input");
    Object.assign(mark, { type: "radio", name: "right", value: String(n), checked: n === written.answer });
    mark.setAttribute("aria-label", `${letter} is right`);
    const field = make("textarea");
    Object.assign(field, { rows: 1, value: written.choices[n] });
    field.setAttribute("aria-label", `option ${letter}`);
    return make("div", "edit-option", mark, make("b", "", letter), field);
  }));
  $("reading").hidden = true;
  $("actions").hidden = true;
  $("editing").hidden = false;
  $("edit-question").focus();
}

function leaveEditing() {
  $("reading").hidden = false;
  $("actions").hidden = false;
  $("editing").hidden = true;
}

function saveEdit() {
  const fields = [...$("edit-options").querySelectorAll("textarea")];
  const right = $("edit-options").querySelector("input[type=radio]:checked");
  decide({
    verdict: "edit",
    question: $("edit-question").value.trim(),
    // An option is one line of the prompt.
    choices: fields.map((field) => field.value.trim().replace(/\s+/g, " ")),
    answer: Number(right.value),
  });
}

async function finish() {
  try {
    await call("finish", {});
    finished = true;
    document.body.replaceChildren(make("main", "", make("section", "", make("h1", "", "Finished"),
      make("p", "", "All decisions are saved. The command in the terminal says the rest; this page can be closed."))));
  } catch (error) {
    problem(`Not finished: ${error.message}.`);
  }
}

document.addEventListener("keydown", (event) => {
  if (finished || items.length === 0 || $("help").open) return;
  if (!$("editing").hidden) {
    if (event.key === "Escape") leaveEditing();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) saveEdit();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const action = ACTIONS().find((a) => a.key === event.key.toLowerCase())
    || MOVES.find((move) => move.keys.includes(event.key.length === 1 ? event.key.toLowerCase() : event.key));
  if (!action) return;
  event.preventDefault();
  action.run();
});

$("editing").addEventListener("submit", (event) => {
  event.preventDefault();
  saveEdit();
});
$("edit-cancel").addEventListener("click", leaveEditing);
$("help-button").addEventListener("click", () => $("help").showModal());
$("help-close").addEventListener("click", () => $("help").close());
$("finish").addEventListener("click", finish);

(async () => {
  try {
    ({ reasons, items, reviewer } = await call("items"));
    const rows = [
      ...ACTIONS().map((action) => [[action.key], action.name.toLowerCase()]),
      ...MOVES.map((move) => [move.keys.map((key) => key.replace("ArrowRight", "→").replace("ArrowLeft", "←")), move.name]),
    ];
    $("keys").replaceChildren(...rows.flatMap(([keys, name]) =>
      [make("dt", "", ...keys.flatMap((key) => [make("kbd", "", key), " "])), make("dd", "", name)]));
    go(undecided(0) ?? 0);
  } catch (error) {
    problem(`The items cannot be loaded: ${error.message}.`);
  }
})();
