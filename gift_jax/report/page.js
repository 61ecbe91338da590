// SPDX-License-Identifier: Apache-2.0
// Shows what the controls choose. An element's data-KEY attribute lists, divided by
// spaces, the choices of the control KEY under which it is shown; data-method holds the
// number of a method, whose checkbox shows or hides it. The choices are in the address.
"use strict";

const KEYS = ["metric", "over", "attack", "prompt", "concept",
  "subject", "side", "case", "step", "seed", "method"];
const chooser = document.getElementById("run");
const runs = [...document.querySelectorAll("[data-run]")].map((node) => ({
  node,
  selects: [...node.querySelectorAll("select[name]")],
  boxes: [...node.querySelectorAll("input[name=method]")],
  parts: [...node.querySelectorAll(KEYS.map((key) => `[data-${key}]`).join(","))],
  lists: [...node.querySelectorAll("[data-list]")],
}));

function current() {
  return runs[Number(chooser.value)];
}

// Returns the choices: {control: choice}, and the numbers of the hidden methods.
function readControls(run) {
  const choices = Object.fromEntries(run.selects.map((one) => [one.name, one.value]));
  const hidden = run.boxes.filter((box) => !box.checked).map((box) => box.value);
  return { choices, hidden };
}

function isShown(part, choices, hidden) {
  return KEYS.every((key) => {
    const value = part.dataset[key];
    if (value === undefined) return true;
    if (key === "method") return !hidden.includes(value);
    return value.split(" ").includes(choices[key]);
  });
}

function show() {
  const run = current();
  const { choices, hidden } = readControls(run);
  for (const one of runs) one.node.toggleAttribute("hidden", one !== run);
  for (const part of run.parts) {
    part.toggleAttribute("hidden", !isShown(part, choices, hidden));
  }
  for (const heading of run.node.querySelectorAll("th[data-of]")) spanColumns(heading);
  for (const list of run.lists) { // say so where nothing is left
    const isEmpty = ![...list.children].some((child) => !child.hidden);
    list.nextElementSibling.toggleAttribute("hidden", !isEmpty);
  }
}

// Makes a group's heading as wide as those of its columns that are shown.
function spanColumns(heading) {
  const group = heading.dataset.of;
  const row = heading.parentElement.nextElementSibling;
  const columns = [...row.children].filter((cell) => cell.dataset.in === group && !cell.hidden);
  heading.toggleAttribute("hidden", columns.length === 0);
  heading.colSpan = Math.max(1, columns.length);
}

function writeAddress() {
  const { choices, hidden } = readControls(current());
  const query = new URLSearchParams({ run: chooser.value, ...choices });
  for (const method of hidden) query.append("hide", method);
  history.replaceState(null, "", `#${query}`);
}

// Sets the controls as the address says, as far as it names choices that there are.
function readAddress() {
  const query = new URLSearchParams(location.hash.slice(1));
  choose(chooser, query.get("run"));
  const run = current();
  for (const select of run.selects) choose(select, query.get(select.name));
  const hidden = query.getAll("hide");
  for (const box of run.boxes) box.checked = !hidden.includes(box.value);
}

function choose(select, value) {
  if ([...select.options].some((option) => option.value === value)) select.value = value;
}

// Fades the other methods while the pointer is on one.
function fade(event) {
  const chip = event.target.closest(".chip");
  const method = event.type === "pointerover" && chip ? chip.dataset.chip : null;
  for (const part of current().node.querySelectorAll("svg [data-method]")) {
    part.classList.toggle("dim", method !== null && part.dataset.method !== method);
  }
}

document.addEventListener("change", () => {
  writeAddress();
  show();
});
document.addEventListener("pointerover", fade);
document.addEventListener("pointerout", fade);
addEventListener("hashchange", () => {
  readAddress();
  show();
});
readAddress();
show();
