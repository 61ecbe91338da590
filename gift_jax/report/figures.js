// SPDX-License-Identifier: Apache-2.0
// Plots as inline SVG: lines with bands, and points with whiskers.
"use strict";

const SVG = $("drawing").namespaceURI;
const COLOURS = 7;
const SHAPES = ["square", "up", "diamond", "down", "cross", "times", "dot"];
const DASHES = ["", "7 3", "2 2.5", "8 3 2 3", "4 2"];

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// How a method is drawn; it is told apart by marker and dash, too.
function lookOf(method) {
  const i = DATA.looks.indexOf(method);
  if (i < 0) return { colour: "var(--ink)", shape: "ring", dash: "" };
  return {
    colour: `var(--c${i % COLOURS})`,
    shape: SHAPES[i % SHAPES.length],
    dash: DASHES[i % DASHES.length],
  };
}

const OUTLINES = {
  square: "M-3.4-3.4h6.8v6.8h-6.8z",
  up: "M0-4.4L4.3 3.2H-4.3z",
  down: "M0 4.4L4.3-3.2H-4.3z",
  diamond: "M0-4.8L4.8 0 0 4.8-4.8 0z",
  cross: "M-1.4-4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z",
  times: "M-4-2.2L-2.2-4 0-1.8 2.2-4 4-2.2 1.8 0 4 2.2 2.2 4 0 1.8-2.2 4-4 2.2-1.8 0z",
  dot: "M-3.8 0a3.8 3.8 0 1 0 7.6 0a3.8 3.8 0 1 0-7.6 0z",
  ring: "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
};

function marker(look, x, y, scale = 1) {
  return svg("path", {
    d: OUTLINES[look.shape],
    transform: `translate(${x} ${y}) scale(${scale})`,
    fill: look.shape === "ring" ? "var(--card)" : look.colour,
    stroke: look.shape === "ring" ? look.colour : "var(--card)",
    "stroke-width": look.shape === "ring" ? 1.8 : 0.8,
  });
}

function swatch(method) {
  const look = lookOf(method);
  const line = { x1: 1, x2: 33, y1: 7, y2: 7, stroke: look.colour, "stroke-width": 2 };
  const drawn = svg("line", { ...line, "stroke-dasharray": look.dash });
  const box = { class: "swatch", viewBox: "0 0 34 14", "aria-hidden": "true" };
  return svg("svg", box, drawn, marker(look, 17, 7));
}

// Returns round ticks that cover low to high.
function ticksOf(low, high, about) {
  if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
  const raw = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 2.5, 5, 10].find((n) => n * power >= raw * 0.999) * power;
  const first = Math.floor(low / unit + 1e-6), last = Math.ceil(high / unit - 1e-6);
  const count = Math.round(last - first) + 1;
  return Array.from({ length: count }, (_, i) => Number(((first + i) * unit).toPrecision(12)));
}

function show(value) {
  const size = Math.abs(value);
  const text = value.toFixed(size < 10 ? 2 : size < 1000 ? 1 : 0);
  return Number(text) === 0 ? text.replace("-", "") : text;
}

// Returns an empty plot: {node, x, y} with the axes drawn. ticks are [value, label].
function axes(width, height, xTicks, yTicks, xLabel, yLabel) {
  const box = { left: 40, right: width - 12, top: 10, bottom: height - 34 };
  const scale = (ticks, from, to) => {
    const low = ticks[0], span = ticks.at(-1) - low || 1;
    return (value) => from + ((value - low) / span) * (to - from);
  };
  const x = scale(xTicks, box.left + 6, box.right - 6), y = scale(yTicks, box.bottom, box.top);
  const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const tick of yTicks) {
    const line = { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) };
    node.append(svg("line", { ...line, class: "rule" }));
    node.append(svg("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick));
  }
  for (const tick of xTicks) {
    const line = { x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4 };
    node.append(svg("line", { ...line, class: "axis" }));
    const place = { x: x(tick), y: box.bottom + 16, "text-anchor": "middle" };
    node.append(svg("text", place, tick));
  }
  const base = { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom };
  node.append(svg("line", { ...base, class: "axis" }));
  const middle = (box.left + box.right) / 2;
  node.append(svg("text", { x: middle, y: height - 3, "text-anchor": "middle" }, xLabel));
  if (yLabel) {
    const turned = `translate(9 ${(box.top + box.bottom) / 2}) rotate(-90)`;
    node.append(svg("text", { transform: turned, "text-anchor": "middle" }, yLabel));
  }
  return { node, x, y, box };
}

// The range of values that several panels share; from 0 where that is not far.
function sharedTicks(lines) {
  const values = lines.flatMap((line) => line.points.flatMap((point) => point.slice(1, 4)));
  const high = Math.max(...values);
  let low = Math.min(...values);
  if (low > 0 && low < 0.6 * high) low = 0;
  return ticksOf(low, high, 4);
}

// Returns a panel of lines. Each is {method, points: [[step, value, low, high, n]]}.
function linePlot(lines, yTicks, label) {
  const steps = [...new Set(lines.flatMap((line) => line.points.map((p) => p[0])))];
  steps.sort((a, b) => a - b);
  const last = steps.at(-1) || 1;
  const crowded = steps.some((step, i) => i && step - steps[i - 1] < last / 9);
  const xTicks = crowded || steps.length < 2 ? ticksOf(0, last, 4) : steps;
  const plot = axes(290, 200, xTicks, yTicks, "attack steps");
  plot.node.setAttribute("aria-label", label);
  for (const line of lines) {
    const look = lookOf(line.method);
    const group = svg("g", { class: "series", "data-method": line.method });
    const at = (column) => line.points.map((p) => `${plot.x(p[0])} ${plot.y(p[column])}`);
    if (line.points.every((p) => p[4] > 1)) {
      const ring = [...at(3), ...at(2).reverse()].join("L");
      group.append(svg("path", { d: `M${ring}Z`, fill: look.colour, "fill-opacity": 0.11 }));
    }
    const path = { d: `M${at(1).join("L")}`, fill: "none", stroke: look.colour };
    group.append(svg("path", { ...path, "stroke-width": 2, "stroke-dasharray": look.dash }));
    for (const p of line.points) group.append(marker(look, plot.x(p[0]), plot.y(p[1]), 0.85));
    plot.node.append(group);
  }
  follow(plot, lines, steps);
  return plot.node;
}

// Shows what all lines say at the step next to the pointer.
function follow(plot, lines, steps) {
  const { node, x, box } = plot;
  const ends = { y1: box.top, y2: box.bottom, class: "guide", visibility: "hidden" };
  const guide = svg("line", ends);
  node.append(guide);
  const hide = () => {
    guide.setAttribute("visibility", "hidden");
    $("tip").hidden = true;
  };
  const move = (event) => {
    const frame = node.getBoundingClientRect();
    const where = ((event.clientX - frame.left) / frame.width) * node.viewBox.baseVal.width;
    const gap = (step) => Math.abs(x(step) - where);
    const step = steps.reduce((a, b) => (gap(b) < gap(a) ? b : a));
    for (const end of ["x1", "x2"]) guide.setAttribute(end, x(step));
    guide.setAttribute("visibility", "visible");
    const found = lines
      .map((line) => [line.method, line.points.find((p) => p[0] === step)])
      .filter(([, p]) => p)
      .sort(([, a], [, b]) => b[1] - a[1]);
    const rows = found.map(([method, p]) => [
      method, show(p[1]), p[4] > 1 ? `[${show(p[2])}, ${show(p[3])}]` : "",
    ]);
    openTip(event, `After ${step} steps`, rows);
  };
  node.addEventListener("pointermove", move);
  node.addEventListener("pointerdown", move);
  node.addEventListener("pointerleave", hide);
}

// Opens the tooltip beside the pointer. rows: [method, value, small print].
function openTip(event, title, rows) {
  const line = ([method, value, small]) =>
    el("div", {}, swatch(method), method, el("b", {}, value), el("small", {}, small));
  const tip = $("tip");
  tip.replaceChildren(el("p", {}, title), ...rows.map(line));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const isRight = event.clientX + width + 24 > document.documentElement.clientWidth;
  const left = event.clientX + (isRight ? -width - 16 : 16);
  const top = Math.min(event.clientY + 12, innerHeight - height - 8);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

// Returns a plot of points {method, x, y, xs: [low, high], ys: [low, high]}.
function pointPlot(points, xTicks, yTicks, label) {
  const plot = axes(340, 290, xTicks, yTicks, "benign gap (0 is best)", "harmful gap (1 is best)");
  const { node, x, y, box } = plot;
  node.setAttribute("aria-label", label);
  node.append(
    svg("line", { x1: x(0), x2: x(0), y1: box.top, y2: box.bottom, class: "zero" }),
    svg("line", { x1: box.left, x2: box.right, y1: y(0), y2: y(0), class: "zero" }),
    svg("circle", { cx: x(0), cy: y(1), r: 8, class: "ideal" }),
  );
  for (const point of points) {
    const look = lookOf(point.method);
    const group = svg("g", { class: "series", "data-method": point.method });
    const stroke = { stroke: look.colour, "stroke-width": 1.4, "stroke-opacity": 0.55 };
    const [cx, cy] = [x(point.x), y(point.y)];
    if (point.xs) {
      const [x1, x2] = point.xs.map(x);
      group.append(svg("line", { ...stroke, x1, x2, y1: cy, y2: cy }));
    }
    if (point.ys) {
      const [y1, y2] = point.ys.map(y);
      group.append(svg("line", { ...stroke, x1: cx, x2: cx, y1, y2 }));
    }
    group.append(marker(look, cx, cy, 1.2));
    group.addEventListener("pointermove", (event) => openTip(event, point.method, point.rows));
    group.addEventListener("pointerleave", () => ($("tip").hidden = true));
    node.append(group);
  }
  node.append(...labels(points, x, y, box));
  return node;
}

// Where a name may stand about its point: [x, y, text-anchor], the best first.
const PLACES = [
  [9, 4, "start"], [-9, 4, "end"], [7, -7, "start"], [7, 15, "start"],
  [-7, -7, "end"], [-7, 15, "end"], [0, -11, "middle"], [0, 19, "middle"],
];

// Names beside the points, where they do not cover points or other names.
function labels(points, x, y, box) {
  const taken = points.map((point) => ({
    owner: point, left: x(point.x) - 6, right: x(point.x) + 6, top: y(point.y) - 6, bottom: y(point.y) + 6,
  }));
  return points.map((point) => {
    const width = 6.1 * point.method.length;
    const options = PLACES.map(([dx, dy, anchor]) => {
      const at = x(point.x) + dx, bottom = y(point.y) + dy;
      const left = at - { start: 0, middle: width / 2, end: width }[anchor];
      return { at, anchor, left, right: left + width, top: bottom - 9, bottom: bottom + 2 };
    });
    const hits = (one) => taken.filter((other) => other.owner !== point && one.left < other.right
      && other.left < one.right && one.top < other.bottom && other.top < one.bottom).length;
    const costs = options.map((one) =>
      hits(one) + 2 * (one.right > box.right + 8 || one.left < box.left || one.bottom > box.bottom));
    const best = options[costs.indexOf(Math.min(...costs))];
    taken.push({ owner: null, ...best });
    const place = { x: best.at, y: best.bottom - 2, "text-anchor": best.anchor, class: "name series" };
    return svg("text", { ...place, "data-method": point.method }, point.method);
  });
}
