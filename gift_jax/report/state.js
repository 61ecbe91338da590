// SPDX-License-Identifier: Apache-2.0
// What is shown lives in the address after the "#", so that a view can be linked.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const MULTIPLE = ["hide"]; // keys that may occur several times
const $ = (id) => document.getElementById(id);

// Returns an HTML element. Names come from configs: text is never parsed as markup.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

// Returns the state: what the address says where that is a choice, else the default.
function readState() {
  const said = new URLSearchParams(location.hash.slice(1));
  const pick = (key, choices, fallback) => {
    const value = said.get(key);
    return value !== null && choices.includes(value) ? value : fallback;
  };
  const state = { theme: pick("theme", ["auto", "light", "dark"], "auto") };
  const runs = DATA.runs.map((_, i) => String(i + 1));
  state.run = pick("run", runs, "1");
  const run = DATA.runs[Number(state.run) - 1];
  const metrics = run.metrics.map((metric) => metric.name);
  const start = (value, choices) => (choices.includes(value) ? value : choices[0] || "");
  state.metric = pick("metric", metrics, start(DATA.start.metric, metrics));
  state.over = pick("over", run.overs, start(DATA.start.over, run.overs));
  const attacks = [...new Set(run.matches.map((match) => match.attack))];
  state.attack = pick("attack", attacks, "");
  state.prompt = pick("prompt", run.prompts, "");
  state.concept = pick("concept", run.concepts, "");
  state.hide = said.getAll("hide").filter((name) => run.methods.includes(name));

  state.subject = pick("subject", run.concepts, state.concept || run.concepts[0]);
  const shown = run.matches.filter((match) => isShown(match, state));
  const cases = run.matches.map((match) => match.label);
  state.case = pick("case", cases, (shown[0] || run.matches[0] || { label: "" }).label);
  state.side = pick("side", sidesOf(run), sidesOf(run)[0]);
  state.step = pick("step", stepsOf(run, state), "last");
  state.seed = pick("seed", seedsOf(run), seedsOf(run)[0]);
  return { run, state };
}

// Whether the toggles choose an attack.
function isShown(match, state) {
  const fits = (wanted, value) => !wanted || wanted === value;
  return fits(state.attack, match.attack) && fits(state.prompt, match.prompt);
}

function sidesOf(run) {
  const found = new Set(run.points.map((point) => point.side));
  return ["harmful", "benign", "kept"].filter((side) => found.has(side));
}

function seedsOf(run) {
  const found = new Set(run.points.map((point) => point.seed));
  return [...found].sort((a, b) => a - b).map(String);
}

// Returns "last", "every" and the steps that there are for the chosen pictures.
function stepsOf(run, state) {
  const points = run.points.filter((point) => isPictured(run, point, state));
  const steps = new Set(points.map((point) => point.step));
  return ["last", "every", ...[...steps].sort((a, b) => a - b).map(String)];
}

// Whether a point is of the concept, side and attack chosen, or of before that attack.
function isPictured(run, point, state) {
  if (point.concept !== state.subject || point.side !== state.side) return false;
  if (state.side === "kept") return true;
  const match = run.matches.find((one) => one.label === state.case);
  const isBefore = point.attack === "before";
  if (!match) return isBefore;
  return point.prompt === match.prompt && (isBefore || point.attack === match.attack);
}

// Changes some of the state and, through the address, the page.
function change(changes) {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const [key, value] of Object.entries(changes)) {
    said.delete(key);
    for (const one of MULTIPLE.includes(key) ? value : [value]) {
      if (one !== null) said.append(key, one);
    }
  }
  const text = said.toString() || "view"; // an empty one would scroll to the top
  location.replace("#" + text);
}

// Fills a <select> with [value, text] pairs; one with a single choice is not shown.
function fillSelect(id, pairs, value) {
  const select = $(id);
  select.replaceChildren(
    ...pairs.map(([key, text]) => el("option", { value: key, selected: key === value }, text)),
  );
  select.value = value;
  select.closest("[data-control]").hidden = pairs.length < 2;
}

// Fills a group of radio buttons; the button with the focus keeps it.
function fillRadios(id, names, value) {
  const group = $(id);
  const old = [...group.querySelectorAll("input")];
  if (old.map((input) => input.value).join("\n") !== names.join("\n")) {
    group.replaceChildren(
      ...names.map((name) =>
        el("label", {}, el("input", { type: "radio", name: id, value: name }), el("span", {}, name)),
      ),
    );
  }
  for (const input of group.querySelectorAll("input")) input.checked = input.value === value;
  group.closest("[data-control]").hidden = names.length < 2;
}
