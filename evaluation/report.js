"use strict";
const LARGE = 6; // worst slices shown large at the top
const table = document.getElementById("table");
const bodies = [...table.tBodies];
const heads = [...table.tHead.rows[0].cells];

function valueOf(body, column) {
  const text = body.rows[0].cells[column].dataset.value;
  return text === "" || isNaN(text) ? text : Number(text);
}

function sortBy(column, direction) {
  bodies.sort((a, b) => {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return direction * order;
  });
  table.append(...bodies);
  heads.forEach((head, i) => i === column
    ? head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending") : head.removeAttribute("aria-sort"));
}

heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const number = head.dataset.first === "descending";
  const now = head.getAttribute("aria-sort");
  sortBy(column, now === null ? (number ? -1 : 1) : now === "ascending" ? -1 : 1);
}));

const [find, label, flagged] = ["find", "label", "flagged"].map(id => document.getElementById(id));
function filter() {
  const words = find.value.trim().toLowerCase();
  let count = 0;
  for (const body of bodies) {
    const fits = body.dataset.find.toLowerCase().includes(words)
      && (!label.value || body.dataset.label === label.value)
      && (!flagged.checked || body.dataset.flagged === "1");
    body.hidden = !fits;
    count += fits;
  }
  document.getElementById("shown").textContent = `${count} of ${bodies.length} scans shown`;
}
for (const control of [find, label, flagged])
  for (const event of ["input", "change"]) control.addEventListener(event, filter);
filter();

for (const button of document.querySelectorAll(".name")) button.addEventListener("click", () => {
  const detail = document.getElementById(button.getAttribute("aria-controls"));
  detail.hidden = !detail.hidden;
  button.setAttribute("aria-expanded", String(!detail.hidden));
});

for (const button of document.querySelectorAll("button.viewer")) button.addEventListener("click", () => {
  const frame = document.createElement("iframe");
  frame.title = button.dataset.title;
  frame.srcdoc = JSON.parse(document.getElementById(button.dataset.viewer).textContent);
  button.replaceWith(frame);
  frame.focus();
});

// the pictures of the worst slices stand in the page once, in their scan's row
for (const picture of [...document.querySelectorAll("img.worst")].slice(0, LARGE)) {
  const figure = document.createElement("figure");
  figure.className = "wide";
  const copy = new Image();
  copy.src = picture.src;
  copy.alt = picture.alt;
  figure.append(copy);
  document.getElementById("gallery").append(figure);
}
