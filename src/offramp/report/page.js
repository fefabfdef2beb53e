"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const percent = (value, digits = 1) => (100 * value).toFixed(digits) + " %";
const scored = data.full.score !== null;
let measure = scored ? "score" : "disagreement";
let tried = null; // the setting that is looked at, or null for the chosen point

// an <svg> of the page knows its namespace, so none has to be written here
const holder = document.createElement("template");
holder.innerHTML = "<svg></svg>";
const space = holder.content.firstChild.namespaceURI;

function add(parent, name, attributes = {}, text = "") {
  const node = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

function make(parent, name, attributes = {}, text = "") {
  const node = document.createElement(name);
  Object.assign(node, attributes);
  node.textContent = text;
  parent.append(node);
  return node;
}

// Scales and axes

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (step / power === 2.5 ? 1 : 0)) };
}

function range(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return [low - margin, high + margin];
}

function axes(place, xs, ys, xLabel, yLabel, label, xTicks) {
  place.replaceChildren();
  const width = place.clientWidth, height = place.clientHeight;
  const left = 56, right = 12, top = 24, bottom = 44;
  const svg = add(place, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const x = (value) => left + ((value - xs[0]) / (xs[1] - xs[0])) * (width - left - right);
  const y = (value) => height - bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (height - top - bottom);
  const vertical = ticks(...ys, height / 55);
  for (const at of vertical.found) {
    add(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) });
    add(svg, "text", { x: left - 8, y: y(at) + 4, "text-anchor": "end" }, at.toFixed(vertical.digits));
  }
  const across = xTicks || ticks(...xs, width / 80).found.map((at) => [at, Math.round(100 * at) + " %"]);
  for (const [at, text] of across) {
    add(svg, "text", { x: x(at), y: height - bottom + 18, "text-anchor": "middle" }, text);
  }
  add(svg, "text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel);
  add(svg, "text", { x: 4, y: 12 }, yLabel);
  return { svg, x, y, width, height };
}

function path(dots, x, y) {
  return dots.map((dot, n) => `${n ? "L" : "M"}${x(dot).toFixed(1)} ${y(dot).toFixed(1)}`).join("");
}

// The policies

let colours = 0;
for (const curve of data.curves) {
  curve.colour = curve.baseline ? "var(--grey)" : `var(--s${colours++ % 6})`;
  curve.shown = true;
  curve.dots.forEach((dot, at) => Object.assign(dot, { curve, at }));
}

function legend() {
  for (const curve of data.curves) {
    const label = make(byId("series"), "label");
    const box = make(label, "input", { type: "checkbox", checked: true });
    const key = add(label, "svg", { viewBox: "0 0 24 12", "aria-hidden": "true" });
    const line = add(key, "line", { x1: 0, x2: 24, y1: 6, y2: 6, "stroke-width": 3 });
    line.style.stroke = curve.colour;
    if (curve.baseline) line.setAttribute("stroke-dasharray", "6 4");
    label.append(curve.name + (curve.baseline ? " (baseline)" : ""));
    box.addEventListener("change", () => { curve.shown = box.checked; draw(); });
    make(byId("policy"), "option", { value: curve.name }, curve.name);
  }
}

function said(dot) {
  const score = scored ? `${data.metric} ${dot.score.toFixed(4)}, ` : "";
  const strayed = data.spread ? dot.disagreement.toFixed(4) : percent(dot.disagreement, 2);
  return `cost ${percent(dot.cost)} (${(1 / dot.cost).toFixed(2)}×), ${score}disagreement ${strayed}`;
}

function draw() {
  const dots = data.curves.filter((curve) => curve.shown).flatMap((curve) => curve.dots);
  const marks = [data.full, ...(data.chosen ? [data.chosen] : [])];
  const costs = [...dots, ...marks].map((dot) => dot.cost);
  const name = measure === "score" ? data.metric : "disagreement";
  const { svg, x, y, width, height } = axes(
    byId("chart"), [0, Math.max(1, ...costs) * 1.02], range([...dots, ...marks].map((dot) => dot[measure])),
    "cost, share of full depth", name, `${name} against cost of every policy; the same as a table below`,
  );
  const at = [(dot) => x(dot.cost), (dot) => y(dot[measure])];
  add(svg, "line", { class: "full", x1: x(0), x2: x(1), y1: y(data.full[measure]), y2: y(data.full[measure]) });
  add(svg, "text", { x: x(0) + 4, y: y(data.full[measure]) - 5 }, "full depth");
  for (const curve of data.curves.filter((one) => one.shown)) {
    const line = add(svg, "path", { class: curve.baseline ? "line base" : "line", d: path(curve.dots, ...at) });
    line.style.stroke = curve.colour;
    const few = curve.dots.length < 30;
    for (const dot of few ? curve.dots : []) {
      add(svg, "circle", { cx: at[0](dot), cy: at[1](dot), r: 3.5 }).style.fill = curve.colour;
    }
  }
  const mark = data.chosen || data.full;
  add(svg, "circle", { class: "mark", cx: at[0](mark), cy: at[1](mark), r: 6 });
  add(svg, "text", {
    class: "name", x: at[0](mark) + (mark.cost > 0.8 ? -4 : 10), y: at[1](mark) + 20, "text-anchor": mark.cost > 0.8 ? "end" : "start",
  }, data.chosen ? "chosen" : "full depth");
  if (tried) add(svg, "circle", { class: "hover", cx: at[0](tried), cy: at[1](tried), r: 9 });
  hover(svg, dots, at, width, height);
}

function hover(svg, dots, at, width, height) {
  const ring = add(svg, "circle", { class: "hover", r: 6, visibility: "hidden" });
  const tip = make(byId("chart"), "div", { className: "tip", hidden: true });
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const away = (dot) => Math.hypot(at[0](dot) - event.clientX + box.left, at[1](dot) - event.clientY + box.top);
    const dot = dots.reduce((best, one) => (away(one) < away(best) ? one : best), dots[0]);
    return dot && away(dot) < 60 ? dot : null;
  };
  svg.addEventListener("pointermove", (event) => {
    const dot = nearest(event);
    tip.hidden = !dot;
    ring.setAttribute("visibility", dot ? "visible" : "hidden");
    if (!dot) return;
    const [left, top] = [at[0](dot), at[1](dot)];
    ring.setAttribute("cx", left);
    ring.setAttribute("cy", top);
    tip.textContent = `${dot.curve.name}\n${dot.said}\n${said(dot).replaceAll(", ", "\n")}`;
    tip.style.left = Math.max(0, Math.min(left + 14, width - tip.offsetWidth)) + "px";
    tip.style.top = Math.max(0, top + 14 + tip.offsetHeight > height ? top - tip.offsetHeight - 14 : top + 14) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    ring.setAttribute("visibility", "hidden");
  });
  svg.addEventListener("click", (event) => {
    const dot = nearest(event);
    if (dot) look(dot);
  });
}

// Trying a setting

const hint = byId("tried").textContent;
const heading = byId("which").textContent;
const chosenLeft = [...byId("left").tBodies[0].rows].map((row) => [...row.cells].slice(1, 3).map((cell) => cell.textContent));
const chosenBars = [...byId("left").querySelectorAll("i")].map((bar) => bar.style.width);

function look(dot) {
  tried = dot;
  byId("policy").value = dot.curve.name;
  byId("setting").max = dot.curve.dots.length - 1;
  byId("setting").value = dot.at;
  byId("setting").setAttribute("aria-valuetext", `${dot.said}, ${said(dot)}`);
  byId("tried").textContent = `${dot.curve.name}, ${dot.said}: ${said(dot)}`;
  const layers = dot.left.reduce((sum, count, layer) => sum + count * (layer + 1), 0) / data.rows;
  byId("which").textContent = `Tried: ${dot.curve.name}, ${dot.said}. The mean exit layer is ${layers.toFixed(2)} of ${dot.left.length}.`;
  show(dot.left.map((count) => [count.toLocaleString("en"), percent(count / data.rows)]),
    dot.left.map((count) => percent(count / data.rows, 2).replace(" ", "")));
  draw();
}

function show(cells, bars) {
  [...byId("left").tBodies[0].rows].forEach((row, n) => {
    cells[n].forEach((text, place) => { row.cells[place + 1].textContent = text; });
    row.querySelector("i").style.width = bars[n];
  });
}

function back() {
  tried = null;
  byId("tried").textContent = hint;
  byId("which").textContent = heading;
  show(chosenLeft, chosenBars);
  draw();
}

// The exits

function drawExits() {
  const first = scored ? ["score", data.metric] : ["disagreement", "disagreement"];
  const lines = [[...first, "--s0", ""], ["auroc", "AUROC", "--s1", "5 3"]]
    .map((line) => [...line, data.exits.filter((one) => one[line[0]] !== null)])
    .filter((line) => line[4].length);
  const values = lines.flatMap(([key, , , , dots]) => dots.map((dot) => dot[key]));
  const every = Math.ceil(data.exits.length / 16);
  const { svg, x, y, width } = axes(
    byId("exit-chart"), [0.7, data.exits.length + 0.3], range(values), "exit layer", "",
    `${lines.map((line) => line[1]).join(" and ")} of each exit; the same as a table below`,
    data.exits.filter((one) => (one.layer - 1) % every === 0).map((one) => [one.layer, one.layer]),
  );
  let right = width - 12;
  for (const [key, name, colour, dashes, dots] of [...lines].reverse()) {
    const line = add(svg, "path", { class: "line", "stroke-dasharray": dashes, d: path(dots, (dot) => x(dot.layer), (dot) => y(dot[key])) });
    line.style.stroke = `var(${colour})`;
    for (const dot of dots) {
      const circle = add(svg, "circle", { cx: x(dot.layer), cy: y(dot[key]), r: 4 });
      circle.style.fill = `var(${colour})`;
      add(circle, "title", {}, `layer ${dot.layer}: ${name} ${dot[key].toFixed(4)}`);
    }
    const text = add(svg, "text", { x: right, y: 12, "text-anchor": "end" }, name);
    const key2 = right - text.getComputedTextLength() - 30;
    const sample = add(svg, "line", { x1: key2, x2: key2 + 24, y1: 8, y2: 8, "stroke-width": 3, "stroke-dasharray": dashes });
    sample.style.stroke = `var(${colour})`;
    right = key2 - 16;
  }
}

// The price

byId("rate").addEventListener("input", () => {
  const rate = Number(byId("rate").value);
  for (const cell of document.querySelectorAll("[data-unit]")) {
    const cost = Number(cell.dataset.unit) * rate;
    cell.textContent = cost.toLocaleString("en", { maximumSignificantDigits: 4 });
  }
});

for (const part of document.querySelectorAll(".live")) part.hidden = false;
legend();
if (byId("measure")) byId("measure").addEventListener("change", () => { measure = byId("measure").value; draw(); });
const curveOf = (name) => data.curves.find((curve) => curve.name === name);
byId("policy").addEventListener("change", () => { const { dots } = curveOf(byId("policy").value); look(dots[Math.floor(dots.length / 2)]); });
byId("setting").addEventListener("input", () => look(curveOf(byId("policy").value).dots[byId("setting").value]));
byId("back").addEventListener("click", back);
const start = data.curves.find((curve) => data.chosen && curve.name.startsWith(data.chosen.said)) || data.curves.at(-1);
byId("policy").value = start.name;
byId("setting").max = start.dots.length - 1;
let seen = 0;
function redraw() {
  if (window.innerWidth === seen) return;
  seen = window.innerWidth;
  draw();
  drawExits();
}
window.addEventListener("resize", redraw);
redraw();
