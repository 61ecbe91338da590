// SPDX-License-Identifier: Apache-2.0
// The uncurated pictures; and what starts the page.
"use strict";

function drawPictures(run, state) {
  const count = DATA.pictures;
  $("pictures-note").textContent = count
    ? `The first ${count} pictures of each cell, as they came: uncurated. ` +
      "Below each: what the chosen metric says of it, and what the judge saw."
    : "This page was made without pictures (--pictures 0).";
  const found = run.points.filter((point) => isPictured(run, point, state)
    && !state.hide.includes(point.method) && isOfSeed(run, point, state));
  const order = (point) => run.methods.indexOf(point.method);
  found.sort((a, b) => order(a) - order(b) || a.step - b.step);
  const steps = (method) => found.filter((p) => p.method === method).map((p) => p.step);
  const isWanted = (point) =>
    state.step === "every" || String(point.step) === state.step ||
    (state.step === "last" && point.step === Math.max(...steps(point.method)));
  const strips = count ? found.filter(isWanted).map((point) => strip(point, state)) : [];
  const none = el("p", { class: "empty" }, "No pictures of this choice.");
  $("pictures").replaceChildren(
    strips.length || !count ? el("div", { class: "strips" }, strips) : none);
}

// Whether a point has the seed chosen, or is of before the attack with no such seed.
function isOfSeed(run, point, state) {
  if (String(point.seed) === state.seed) return true;
  const isSame = (other) => other.attack === "before" && other.method === point.method
    && other.concept === point.concept && other.side === point.side
    && other.prompt === point.prompt && String(other.seed) === state.seed;
  return point.attack === "before" && point.seed === firstSeed(run, point) && !run.points.some(isSame);
}

function firstSeed(run, point) {
  const same = run.points.filter((other) => other.attack === "before"
    && other.method === point.method && other.concept === point.concept && other.side === point.side);
  return Math.min(...same.map((other) => other.seed));
}

function strip(point, state) {
  const value = point.values[state.metric];
  const when = point.attack === "before" ? "before the attack" : `after ${point.step} steps`;
  const reading = value == null ? null : `${state.metric} ${show(value)}`;
  const head = el("header", {}, swatch(point.method), el("strong", {}, point.method),
    el("span", {}, when), reading && el("span", { class: "reading" }, reading));
  const parts = [head];
  if (point.image) parts.push(image(point, when), marks(point, state));
  else parts.push(el("div", { class: "absent" }, `No picture: ${point.note}`));
  return el("article", { class: "strip", "data-method": point.method, "data-step": point.step }, parts);
}

function image(point, when) {
  const text = `First ${point.shown} of ${point.num} pictures: ${point.concept}, ${point.side}, ` +
    `${point.method}, ${point.attack}, ${when}`;
  const node = el("img", { src: point.image, alt: text, title: text, decoding: "async" });
  node.addEventListener("load", () => {
    const columns = Math.min(DATA.columns, point.shown);
    node.classList.toggle("sharp", node.naturalWidth / columns <= 64);
    node.style.maxWidth = `${columns * 96}px`;
  });
  return node;
}

// What the metric says of each picture, and what the judge sees in it.
function marks(point, state) {
  const values = point.samples[state.metric] || [];
  const columns = Math.min(DATA.columns, point.shown);
  const isYesNo = values.length > 0 && values.every((value) => value === 0 || value === 1);
  const items = Array.from({ length: point.shown }, (_, i) => {
    const seen = [point.styles[i], point.things[i]].filter(Boolean).join(" ");
    const value = values[i] == null ? null : isYesNo ? (values[i] ? "✓" : "✗") : show(values[i]);
    const spoken = isYesNo && value ? (values[i] ? "yes" : "no") : value;
    return el("li", { title: [spoken, seen].filter(Boolean).join(", ") },
      value && el("b", { "aria-label": spoken }, value), point.things[i] || null);
  });
  const list = el("ol", { class: "marks", "aria-label": `${state.metric} of each picture` }, items);
  list.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  list.style.maxWidth = `${columns * 96}px`;
  return list;
}

// What else a choice resets.
const RESETS = {
  run: ["metric", "over", "attack", "prompt", "concept", "hide", "subject", "case", "side", "step", "seed"],
  attack: ["case", "step"],
  prompt: ["case", "step"],
  concept: ["subject", "step"],
  subject: ["step"],
  case: ["step"],
  side: ["step"],
};

function listen() {
  document.addEventListener("change", (event) => {
    const { id, name, value } = event.target;
    const key = name || id;
    const resets = (RESETS[key] || []).map((other) => [other, other === "hide" ? [] : null]);
    change({ ...Object.fromEntries(resets), [key]: value });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") $("tip").hidden = true;
  });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => copy(button));
  }
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address holds the state
    $("main").setAttribute("tabindex", "-1");
    $("main").focus();
  });
  addEventListener("hashchange", drawAll);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}

// Copies the command; where the browser refuses, selects it.
async function copy(button) {
  const text = button.parentElement.querySelector("pre");
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text);
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

listen();
drawAll();
