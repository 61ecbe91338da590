// SPDX-License-Identifier: Apache-2.0
// The page's sections, drawn anew from the state whenever it changes.
"use strict";

const DASH = "–";

function drawAll() {
  const { run, state } = readState();
  drawTheme(state);
  for (const part of document.querySelectorAll("[data-run]")) {
    part.hidden = part.dataset.run !== String(Number(state.run) - 1);
  }
  fillControls(run, state);
  drawSummary(run, state);
  drawBefore(run, state);
  drawChips(run, state);
  drawTrajectories(run, state);
  drawTradeoff(run, state);
  drawPictures(run, state);
  $("tip").hidden = true;
}

function drawTheme(state) {
  const wantsDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const isDark = state.theme === "dark" || (state.theme === "auto" && wantsDark);
  document.documentElement.toggleAttribute("data-dark", isDark);
  for (const input of document.querySelectorAll("#theme input")) {
    input.checked = input.value === state.theme;
  }
}

function fillControls(run, state) {
  const same = (names) => names.map((name) => [name, name]);
  const all = (text, names) => (names.length > 1 ? [["", text], ...same(names)] : same(names));
  const attacks = [...new Set(run.matches.map((match) => match.attack))];
  fillSelect("run", DATA.runs.map((one, i) => [String(i + 1), one.label]), state.run);
  fillSelect("metric", same(run.metrics.map((metric) => metric.name)), state.metric);
  fillRadios("over", run.overs, state.over);
  fillSelect("attack", all("all attacks", attacks), state.attack);
  fillSelect("prompt", all("all prompts", run.prompts), state.prompt);
  fillSelect("concept", all("mean of all", run.concepts), state.concept);
  fillSelect("subject", same(run.concepts), state.subject);
  fillRadios("side", sidesOf(run), state.side);
  fillSelect("case", same(run.matches.map((match) => match.label)), state.case);
  const words = { last: "the last one", every: "every step", 0: "0, before the attack" };
  const steps = stepsOf(run, state).map((step) => [step, words[step] || step]);
  fillSelect("step", steps, state.step);
  fillSelect("seed", same(seedsOf(run)), state.seed);
  if (state.side === "kept") $("case").closest("[data-control]").hidden = true;
}

// Returns a table's cell. number: {text, spread, at, best} or null.
function numberCell(number, kind) {
  if (!number) return el("td", { class: `${kind} nothing`, title: "nothing to tell" }, DASH);
  const parts = [el("span", { class: "value" }, number.text)];
  if (number.best) parts[0].append(el("span", { class: "sr" }, " (best)"));
  if (number.spread) parts.push(el("span", { class: "spread" }, number.spread));
  if (number.at) parts.push(el("span", { class: "at" }, number.at));
  return el("td", { class: number.best ? `${kind} best` : kind }, parts);
}

// Returns a name that may break after each of its underscores.
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]));
}

// Returns a table of methods. groups: [heading, [[sub-heading, kind, numbers]]].
function methodTable(caption, methods, groups, kind = "") {
  const columns = groups.flatMap(([, subs]) => subs.map((sub, i) => [...sub, i === 0]));
  const kindOf = ([, kind, , isFirst]) => (isFirst ? `${kind} first` : kind);
  const heads = groups.map(([head, subs]) =>
    el("th", { colspan: subs.length, scope: "colgroup", class: `${subs[0][1]} first` }, head));
  const seconds = columns.map((column) =>
    el("th", { scope: "col", class: kindOf(column) }, column[0]));
  const corner = el("th", { rowspan: 2, scope: "col", class: "corner" }, "method");
  const rows = methods.map((method, i) =>
    el("tr", {},
      el("th", { scope: "row" }, breakable(method)),
      columns.map((column) => numberCell(column[2][i], kindOf(column)))));
  const table = el("table", { class: `gaps ${kind}` },
    el("caption", { class: "sr" }, caption),
    el("thead", {}, el("tr", {}, corner, heads), el("tr", {}, seconds)),
    el("tbody", {}, rows));
  const box = { class: "scroll", tabindex: "0", role: "region", "aria-label": caption };
  return el("div", box, table);
}

function drawSummary(run, state) {
  const table = run.gaps[state.metric]?.[state.over]?.[state.concept];
  if (!table) {
    const text = `results.json holds no gap ratios of ${state.metric}.`;
    $("summary").replaceChildren(el("p", { class: "empty" }, text));
    return;
  }
  const groups = [];
  const families = new Set(run.matches.filter((m) => isShown(m, state)).map((m) => m.family));
  const worst = Object.entries(table.worst[state.prompt] || table.worst[""])
    .filter(([family]) => !state.attack || families.has(family))
    .map(([family, numbers]) => [family, "worst", numbers]);
  if (worst.length) groups.push(["Worst case, harmful", worst]);
  run.matches.forEach((match, i) => {
    if (!isShown(match, state)) return;
    const sides = ["harmful", "benign"].map((side) => [side, "", table[side][i]]);
    groups.push([match.label, sides]);
  });
  const of = state.concept || "mean over concepts";
  const caption = `Gap ratios of ${state.metric}, ${state.over} of the trajectory, ${of}`;
  $("summary").replaceChildren(methodTable(caption, run.defended, groups));
}

function drawBefore(run, state) {
  const columns = run.before[state.metric]?.[state.concept] || [];
  const known = new Set(columns.map((column) => column.prompt)); // not every attack's
  const any = !known.has(state.prompt);
  const shown = columns.filter((c) => any || c.side === "kept" || c.prompt === state.prompt);
  if (!shown.length) {
    const text = `${state.metric} was not measured before the attacks.`;
    $("before").replaceChildren(el("p", { class: "empty" }, text));
    return;
  }
  const several = new Set(shown.map((column) => column.prompt)).size > 1;
  const subs = shown.map((column) => [
    several ? `${column.side} (${column.prompt})` : column.side, "", column.numbers,
  ]);
  const caption = `${state.metric} before any attack`;
  $("before").replaceChildren(methodTable(caption, run.methods, [[headOf(run, state), subs]], "brief"));
}

// The metric's name and what higher means.
function headOf(run, state) {
  const { name, higher } = run.metrics.find((metric) => metric.name === state.metric);
  return higher ? `${name} (higher: ${higher})` : name;
}

// The methods as buttons: the legend of every plot, and what is hidden in it.
function drawChips(run, state) {
  for (const group of document.querySelectorAll("[data-chips]")) {
    const focused = group.contains(document.activeElement) && document.activeElement.value;
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Methods shown");
    group.replaceChildren(...run.methods.map((method) => chip(method, state)));
    for (const button of group.children) if (button.value === focused) button.focus();
  }
}

function chip(method, state) {
  const isShownNow = !state.hide.includes(method);
  const button = el("button", { type: "button", class: "chip", "aria-pressed": String(isShownNow) },
    swatch(method), el("span", {}, method));
  button.value = method;
  button.addEventListener("click", () => {
    const others = state.hide.filter((name) => name !== method);
    change({ hide: isShownNow ? [...others, method] : others });
  });
  for (const type of ["pointerenter", "focus"]) button.addEventListener(type, () => stress(method));
  for (const type of ["pointerleave", "blur"]) button.addEventListener(type, () => stress(null));
  return button;
}

// Fades every other method; nobody's where it is null.
function stress(method) {
  for (const part of document.querySelectorAll(".series")) {
    part.classList.toggle("dim", method !== null && part.dataset.method !== method);
  }
}

function drawTrajectories(run, state) {
  const drawn = (run.curves[state.metric] || []).filter(
    (line) => line.concept === state.concept && !state.hide.includes(line.method));
  const banded = drawn.some((line) => line.points.some((point) => point[4] > 1));
  const what = state.concept ? state.concept
    : run.concepts.length > 1 ? `mean of ${run.concepts.length} concepts` : run.concepts[0];
  const band = banded ? " Bands: 95% bootstrap over concepts." : "";
  $("trajectories-note").textContent = `${headOf(run, state)}, ${what}.${band}`;
  const shown = run.matches.map((match, i) => [match, i]).filter(([match]) => isShown(match, state));
  const figures = shown.map(([match, i]) => {
    const panels = ["harmful", "benign"].map((side) => {
      const lines = drawn.filter((line) => line.match === i && line.side === side);
      const label = `${state.metric} against attack steps: ${match.label}, ${side}`;
      const plot = lines.length ? linePlot(lines, sharedTicks(drawn), label)
        : el("p", { class: "empty" }, "Nothing to draw.");
      return el("div", {}, el("h4", {}, side), plot);
    });
    return el("figure", { class: shown.length === 1 ? "alone" : "" },
      el("figcaption", {}, match.label), el("div", { class: "two" }, panels));
  });
  $("trajectories").replaceChildren(...figures);
}

function drawTradeoff(run, state) {
  const table = run.gaps[state.metric]?.[state.over]?.[state.concept];
  const shown = run.matches.map((match, i) => [match, i]).filter(([match]) => isShown(match, state));
  if (!table || !shown.length) {
    const text = `results.json holds no gap ratios of ${state.metric}.`;
    $("tradeoff").replaceChildren(el("p", { class: "empty" }, text));
    return;
  }
  const sets = shown.map(([, i]) => pointsOf(run, state, table, i));
  const cover = (about, values) => ticksOf(Math.min(...values), Math.max(...values), about);
  const xTicks = cover(5, [0, 0.2, ...sets.flat().flatMap((p) => p.xs || [p.x])]);
  const yTicks = cover(6, [0, 1, ...sets.flat().flatMap((p) => p.ys || [p.y])]);
  const figures = shown.map(([match], k) => {
    const label = `Harmful against benign gap of each method: ${match.label}`;
    return el("figure", { class: shown.length === 1 ? "alone" : "" },
      el("figcaption", {}, match.label), pointPlot(sets[k], xTicks, yTicks, label));
  });
  $("tradeoff").replaceChildren(...figures);
}

function pointsOf(run, state, table, i) {
  const range = (number) => (number.low === undefined ? null : [number.low, number.high]);
  const points = run.defended.flatMap((method, m) => {
    const [harmful, benign] = [table.harmful[i][m], table.benign[i][m]];
    if (!harmful || !benign) return [];
    const rows = [["harmful", harmful], ["benign", benign]].map(
      ([side, number]) => [method, number.text, `${side} ${number.spread || ""}`]);
    const place = { x: benign.value, y: harmful.value, xs: range(benign), ys: range(harmful) };
    return [{ method, rows, ...place }];
  });
  if (run.methods.length > run.defended.length) { // by definition at 0, 0
    points.push({ method: run.methods[0], x: 0, y: 0, xs: null, ys: null, rows: [] });
  }
  return points.filter((point) => !state.hide.includes(point.method));
}
