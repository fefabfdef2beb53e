"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const written = (value) => value.toFixed(4).replace("-", "\u2212");

function make(parent, name, text = "") {
  const node = document.createElement(name);
  node.textContent = text;
  parent.append(node);
  return node;
}

// The chart: what is drawn already is coloured, brought out and read

function chart() {
  const plot = byId("plot"), frame = byId("frame"), tip = byId("tip"), hair = byId("hair"), slider = byId("cost");
  const labels = [...byId("legend").querySelectorAll("label")];
  const boxes = labels.map((label) => label.querySelector("input"));
  const parts = labels.map((_, n) => [...plot.querySelectorAll(`[data-line="${n}"]`)]);

  function bring(line) {
    parts.forEach((nodes, n) => nodes.forEach((node) => node.classList.toggle("hot", n === line)));
    if (line !== null) parts[line].filter((node) => node.matches(".curve")).forEach((node) => node.parentNode.append(node));
  }

  function colour() {
    boxes.forEach((box, n) => [labels[n], ...parts[n]].forEach((node) => node.classList.toggle("on", box.checked)));
    plot.classList.toggle("alone", !byId("rest").checked);
    read();
  }

  function scoresAt(at, all) {
    return data.lines
      .map((line, n) => ({ n, line, score: line.scores[at] }))
      .filter(({ n, score }) => score !== null && (all || boxes[n].checked))
      .sort((one, other) => other.score - one.score);
  }

  function read() {
    const at = Number(slider.value), cost = data.costs[at], found = scoresAt(at, false);
    const where = `${at} % of full depth (${(1 / cost).toFixed(2)}×)`;
    byId("at").textContent = where;
    byId("read").replaceChildren();
    for (const { n, line, score } of found) {
      const item = make(byId("read"), "li");
      item.append(labels[n].querySelector(".key").cloneNode(true));
      item.append(`${line.name} ${written(score)}`);
    }
    slider.setAttribute("aria-valuetext", [where, ...found.slice(0, 3).map(({ line, score }) => `${line.name} ${written(score)}`)].join(", "));
    hair.style.left = 100 * cost / data.last + "%";
  }

  function follow(event) {
    const box = frame.getBoundingClientRect();
    const at = Math.round(100 * data.last * (event.clientX - box.left) / box.width);
    if (at < Number(slider.min) || at > Number(slider.max)) return leave();
    slider.value = at;
    read();
    const [low, high] = data.values, wanted = high - (event.clientY - box.top) / box.height * (high - low);
    const away = ({ score }) => Math.abs(score - wanted);
    const near = scoresAt(at, byId("rest").checked).reduce((best, one) => (best && away(best) <= away(one) ? best : one), null);
    const found = near && away(near) / (high - low) * box.height < 40 ? near : null;
    hair.hidden = false;
    tip.hidden = !found;
    bring(found && found.n);
    if (!found) return;
    tip.textContent = `${found.line.name}\n${data.metric} ${written(found.score)}`;
    const left = event.clientX - box.left, top = event.clientY - box.top;
    tip.style.left = (left > box.width / 2 ? left - tip.offsetWidth - 14 : left + 14) + "px";
    tip.style.top = Math.max(0, Math.min(top + 14, box.height - tip.offsetHeight)) + "px";
  }

  function leave() {
    tip.hidden = hair.hidden = true;
    bring(null);
  }

  labels.forEach((label, n) => {
    label.addEventListener("pointerenter", () => bring(n));
    label.addEventListener("pointerleave", () => bring(null));
    label.addEventListener("focusin", () => bring(n));
    label.addEventListener("focusout", () => bring(null));
    label.addEventListener("change", colour);
  });
  for (const [name, checked] of [["all", true], ["none", false]]) {
    byId(name).addEventListener("click", () => { boxes.forEach((box) => { box.checked = checked; }); colour(); });
  }
  byId("rest").addEventListener("change", colour);
  slider.addEventListener("input", () => { hair.hidden = false; read(); });
  slider.addEventListener("blur", () => { hair.hidden = true; });
  frame.addEventListener("pointermove", follow);
  frame.addEventListener("pointerdown", follow);
  frame.addEventListener("pointerleave", leave);
  colour();
}

// The table: a click on a heading sorts, a second one turns round; what has no value comes last

function sort(place, direction) {
  const body = byId("ranks").tBodies[0], turn = direction === "ascending" ? 1 : -1;
  const value = (row) => row.cells[place].dataset.value;
  const words = place === 1;
  const compare = (one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return turn * (words ? a.localeCompare(b) : Number(a) - Number(b));
  };
  body.append(...[...body.rows].sort(compare));
}

function sortable() {
  const heads = [...byId("ranks").tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const text = head.textContent;
    head.textContent = "";
    const button = make(head, "button", text);
    button.type = "button";
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const turned = before === "ascending" ? "descending" : "ascending";
      const direction = before ? turned : head.dataset.first;
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      sort(place, direction);
    });
  });
}

function open() {
  const part = location.hash.startsWith("#method-") && byId(location.hash.slice(1));
  if (part) part.open = true;
}

for (const part of document.querySelectorAll(".live")) part.hidden = false;
if (byId("plot")) chart();
if (byId("ranks")) sortable();
window.addEventListener("hashchange", open);
open();
