"use strict";
// Makes report.html handier: sorting, finding, unfolding in place, and the viewers. All it shows is there without it.
document.documentElement.classList.add("scripted");
const viewers = {};

function openViewer(anchor) {
  const root = document.getElementById(`viewer-of-${anchor}`);
  if (!root) return null;
  viewers[anchor] ??= new Viewer(root, JSON.parse(document.getElementById(`volumes-${anchor}`).textContent),
    JSON.parse(document.getElementById("palette").textContent));
  return viewers[anchor];
}

function fill(held) {
  openViewer(held.dataset.scan);
}

for (const held of document.querySelectorAll(".held")) {
  if (!document.getElementById(`viewer-of-${held.dataset.scan}`)) continue;
  for (const cell of held.querySelectorAll("table.regions tbody th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    button.setAttribute("aria-label", `show region ${cell.textContent} in the viewer`);
    cell.replaceChildren(button);
    cell.parentElement.addEventListener("click", () => {
      const viewer = openViewer(held.dataset.scan);
      viewer.ready.then(() => {
        viewer.goTo(Number(button.textContent));
        viewer.root.scrollIntoView({ block: "nearest" });
        viewer.canvases[0].focus({ preventScroll: true });
      });
    });
  }
}

// what scrolls sideways can be reached by keyboard
const scrolled = new ResizeObserver(entries => entries.forEach(({ target }) =>
  target.scrollWidth > target.clientWidth ? target.tabIndex = 0 : target.removeAttribute("tabindex")));
document.querySelectorAll(".wide").forEach(wide => scrolled.observe(wide));

const table = document.getElementById("table");
if (table) listScans(table);
else document.querySelectorAll(".held").forEach(fill);

function listScans(table) {
  const bodies = [...table.tBodies];
  const heads = [...table.tHead.rows[0].cells];

  const valueOf = (body, column) => {
    const text = body.rows[0].cells[column].dataset.value;
    return text === "" || isNaN(text) ? text : Number(text);
  };

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

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = head.dataset.first === "descending" ? -1 : 1;
      sortBy(column, now === null ? first : now === "ascending" ? -1 : 1);
    });
  });
  table.caption.append(" Choose a column's head to sort by it, a scan's name to see it.");

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

  for (const body of bodies) {
    const details = body.querySelector("details"), name = body.querySelector(".name");
    const tell = () => {
      body.rows[1].classList.toggle("open", details.open);
      name.setAttribute("aria-expanded", String(details.open));
      if (details.open) fill(details.querySelector(".held"));
    };
    details.addEventListener("toggle", tell);
    tell();
    name.setAttribute("role", "button");
    name.addEventListener("click", event => {
      event.preventDefault();
      details.open = !details.open;
      tell(); // the event comes later
      if (details.open) history.replaceState(null, "", name.getAttribute("href"));
    });
    name.addEventListener("keydown", event => { if (event.key === " ") { event.preventDefault(); name.click(); } });
  }

  function follow() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const body = target?.closest("tbody");
    if (!body) return;
    body.hidden = false;
    body.querySelector("details").open = true;
    body.scrollIntoView();
  }
  addEventListener("hashchange", follow);
  follow();
}
