"use strict";
// The three-plane viewer of report.html: what viewer.py packs, drawn on three canvases. Voxels are [column, row, slice]:
// left to right, posterior to anterior, inferior to superior.
const PLANES = [
  { name: "axial", across: 0, up: 1, through: 2, ends: ["L", "R", "P", "A"] },
  { name: "coronal", across: 0, up: 2, through: 1, ends: ["L", "R", "I", "S"] },
  { name: "sagittal", across: 1, up: 2, through: 0, ends: ["P", "A", "I", "S"] },
];
const MODES = ["scan", "reconstruction", "residual", "anomaly map"];
const KEYS = "1 scan, 2 reconstruction, 3 residual, 4 anomaly map; F flickers scan and reconstruction; arrows up and "
  + "down step through the slices, left and right go to the next region; O overlay lines, R radiological side, 0 back";

function unpackColours(hex) {
  return Uint8Array.from({ length: hex.length / 2 }, (_, i) => parseInt(hex.slice(2 * i, 2 * i + 2), 16));
}

async function readPixels(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return { wide: image.width, data: context.getImageData(0, 0, image.width, image.height).data };
}

class Viewer {
  constructor(root, packed, palette) {
    Object.assign(this, { root, packed, palette });
    [this.depth, this.tall, this.wide] = packed.shape;
    this.luts = { anomaly: unpackColours(palette.luts.anomaly), residual: unpackColours(palette.luts.residual) };
    this.reset();
    this.build();
    this.ready = Promise.all([readPixels(packed.scan), readPixels(packed.coded)]).then(([scan, coded]) => {
      this.unpack(scan, coded);
      this.draw();
    });
  }

  reset() {
    this.mode = "anomaly map";
    this.voxel = [...this.packed.start];
    Object.assign(this, { threshold: 0, opacity: 1, level: 0.5, window: 1, lines: true, radiological: false });
  }

  unpack(scan, coded) {
    const { depth, tall, wide, packed } = this;
    const count = depth * tall * wide;
    for (const name of ["scan", "code", "residual", "lesion"]) this[name] = new Uint8Array(count);
    this.excess = new Int16Array(count);
    for (let z = 0, i = 0; z < depth; z++) {
      const left = (z % packed.tiles) * wide;
      const bottom = (Math.floor(z / packed.tiles) + 1) * tall - 1;
      for (let y = 0; y < tall; y++) for (let x = 0; x < wide; x++, i++) {
        const at = 4 * ((bottom - y) * scan.wide + left + x);
        this.scan[i] = scan.data[at];
        [this.code[i], this.residual[i], this.lesion[i]] = [coded.data[at], coded.data[at + 1], coded.data[at + 2]];
      }
    }
  }

  build() {
    const { root, packed } = this;
    root.innerHTML = `<div class="planes"></div><div class="bar" aria-hidden="true"></div>
      <p class="values" role="status"></p><div class="controls">
      <fieldset><legend>Shown</legend></fieldset>
      <label>Border at <output></output><input type="range" name="threshold" min="-1" max="4" step="0.02"></label>
      <label>Opacity<input type="range" name="opacity" min="0" max="1" step="0.05"></label>
      <label>Level<input type="range" name="level" min="0" max="1" step="0.01"></label>
      <label>Window<input type="range" name="window" min="0.1" max="1.5" step="0.01"></label>
      <label class="tick"><input type="checkbox" name="lines"> lines${packed.lesion ? " (known lesion in blue)" : ""}</label>
      <label class="tick"><input type="checkbox" name="radiological"> radiological side</label>
      <button type="button">Back to the start</button></div>
      <details><summary>Mouse, touch and keys</summary><p>Click or drag to move; turn the wheel to step through the
      slices, once the viewer has been clicked; drag with Shift or the right button for level and window. Keys:
      ${KEYS}.</p></details>`;
    const shown = root.querySelector("fieldset");
    for (const mode of MODES) {
      const label = document.createElement("label");
      label.innerHTML = `<input type="radio" value="${mode}"> ${mode}`;
      label.firstChild.name = `shown-${root.id}`;
      label.firstChild.addEventListener("change", () => this.change({ mode }));
      shown.append(label);
    }
    for (const input of root.querySelectorAll(".controls > label input")) input.addEventListener("input", () =>
      this.change({ [input.name]: input.type === "checkbox" ? input.checked : Number(input.value) }));
    root.querySelector("button").addEventListener("click", () => { this.reset(); this.draw(); });
    this.buildBar(root.querySelector(".bar"));
    this.canvases = PLANES.map(plane => this.addCanvas(plane));
    new ResizeObserver(() => this.draw()).observe(root);
  }

  buildBar(bar) {
    const { palette, packed } = this;
    const colours = Array.from({ length: 32 }, (_, i) => `rgb(${this.luts.anomaly.slice(24 * i, 24 * i + 3)})`);
    bar.style.backgroundImage = `linear-gradient(to right, ${colours})`;
    for (let times = palette.lowest; times <= palette.highest; times *= 2) {
      const tick = document.createElement("span");
      tick.textContent = (times * packed.threshold).toPrecision(3) + (times === 1 ? " ◂ threshold" : "");
      bar.append(tick);
    }
  }

  addCanvas(plane) {
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${plane.name} plane; ${KEYS}`);
    const [across, up] = [plane.across, plane.up].map(axis => this.size(axis) * this.packed.spacing_mm[axis]);
    canvas.style.aspectRatio = `${across} / ${up}`;
    canvas.style.flexGrow = across / up;
    this.root.querySelector(".planes").append(canvas);
    canvas.addEventListener("wheel", event => {
      if (!this.root.contains(document.activeElement)) return; // the page scrolls
      event.preventDefault();
      this.step(plane, event.deltaY < 0 ? 1 : -1);
    }, { passive: false });
    canvas.addEventListener("pointerdown", event => {
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      this.dragged = event.button === 2 || event.shiftKey ? [event.clientX, event.clientY, this.level, this.window] : [];
      this.drag(plane, canvas, event);
    });
    canvas.addEventListener("pointermove", event => { if (event.buttons) this.drag(plane, canvas, event); });
    canvas.addEventListener("contextmenu", event => event.preventDefault());
    canvas.addEventListener("keydown", event => this.press(plane, event));
    return canvas;
  }

  size(axis) { return [this.wide, this.tall, this.depth][axis]; }

  flipped(plane) { return this.radiological && plane.across === 0; }

  change(changes) {
    Object.assign(this, changes);
    this.draw();
  }

  move(voxel) {
    this.voxel = voxel.map((place, axis) => Math.min(this.size(axis) - 1, Math.max(0, Math.round(place))));
    this.draw();
  }

  step(plane, by) { this.move(this.voxel.map((place, axis) => axis === plane.through ? place + by : place)); }

  goTo(number) {
    const region = this.packed.regions.find(one => one.number === number);
    if (region) this.move(region.voxel);
    this.region = number;
  }

  drag(plane, canvas, event) {
    if (this.dragged.length) {
      const [x, y, level, width] = this.dragged;
      const share = change => change / canvas.clientHeight;
      this.change({ level: Math.min(1, Math.max(0, level + share(event.clientY - y))),
        window: Math.min(1.5, Math.max(0.1, width + share(event.clientX - x))) });
      return;
    }
    const box = canvas.getBoundingClientRect();
    let across = (event.clientX - box.left) / box.width;
    if (this.flipped(plane)) across = 1 - across;
    const voxel = [...this.voxel];
    voxel[plane.across] = across * this.size(plane.across) - 0.5;
    voxel[plane.up] = (1 - (event.clientY - box.top) / box.height) * this.size(plane.up) - 0.5;
    this.move(voxel);
  }

  press(plane, event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    const next = by => this.goTo(Math.min(this.packed.regions.length, Math.max(1, (this.region ?? 0) + by)));
    const actions = {
      arrowup: () => this.step(plane, 1), arrowdown: () => this.step(plane, -1),
      arrowright: () => next(1), arrowleft: () => next(-1),
      f: () => this.change({ mode: this.mode === "scan" ? "reconstruction" : "scan" }),
      o: () => this.change({ lines: !this.lines }), r: () => this.change({ radiological: !this.radiological }),
      0: () => { this.reset(); this.draw(); },
    };
    MODES.forEach((mode, i) => { actions[i + 1] = () => this.change({ mode }); });
    if (!actions[key]) return;
    event.preventDefault();
    actions[key]();
  }

  // codes of viewer.py: the anomaly in doublings of the threshold
  doublings(code) { return (code - 2) / this.palette.codes_per_doubling + this.palette.least_doublings; }

  // what is marked at the border chosen, as regions.py does it: `excess` is the code less that from which a voxel is marked
  mark() {
    if (this.markedAt === this.threshold) return;
    const { palette, code, excess, wide, tall } = this, layer = wide * tall;
    const border = Math.round(2 + (this.threshold - palette.least_doublings) * palette.codes_per_doubling);
    const reach = Math.round(palette.extent_doublings * palette.codes_per_doubling);
    const seen = new Uint8Array(code.length);
    for (let first = 0; first < code.length; first++) {
      if (seen[first]) continue;
      excess[first] = code[first] - border;
      if (code[first] < border) continue;
      const region = [first];
      seen[first] = 1;
      let peak = 0;
      for (let i = 0; i < region.length; i++) {
        const at = region[i], x = at % wide, y = Math.floor(at % layer / wide);
        peak = Math.max(peak, code[at]);
        for (const [inside, next] of [[x > 0, at - 1], [x < wide - 1, at + 1], [y > 0, at - wide],
          [y < tall - 1, at + wide], [at >= layer, at - layer], [at + layer < code.length, at + layer]]) {
          if (!inside || seen[next] || code[next] < border) continue;
          seen[next] = 1;
          region.push(next);
        }
      }
      for (const at of region) excess[at] = code[at] - Math.max(border, peak + reach);
    }
    this.markedAt = this.threshold;
  }

  paint(index, pixel, at) {
    const { palette } = this;
    const contrast = value => 255 * ((value - this.level) / this.window + 0.5);
    const code = this.code[index], residual = (this.residual[index] - 128) / palette.residual_steps;
    const value = this.scan[index] / 255;
    let colour = Array(3).fill(contrast(this.mode === "reconstruction" && code ? value - residual : value));
    if (this.mode === "residual") {
      const share = Math.min(1, Math.max(0, residual / palette.residual_top / 2 + 0.5));
      const place = 3 * Math.round(255 * share);
      colour = code ? this.luts.residual.subarray(place, place + 3) : [128, 128, 128];
    } else if (this.mode === "anomaly map" && code) {
      const lowest = Math.log2(palette.lowest), all = Math.log2(palette.highest) - lowest;
      const above = this.doublings(code + 0.5);
      const place = 3 * Math.round(255 * Math.min(1, Math.max(0, (above - lowest) / all)));
      const strength = palette.steepness * (above - this.threshold - lowest) / all;
      const opacity = this.opacity * Math.min(palette.opaquest, Math.max(0, strength));
      colour = colour.map((grey, i) =>
        Math.min(255, Math.max(0, grey)) * (1 - opacity) + this.luts.anomaly[place + i] * opacity);
    }
    for (let i = 0; i < 3; i++) pixel[at + i] = colour[i];
    pixel[at + 3] = 255;
  }

  // index of a voxel of a plane, by its place across and up
  locate(plane, across, up) {
    const voxel = [...this.voxel];
    [voxel[plane.across], voxel[plane.up]] = [across, up];
    return (voxel[2] * this.tall + voxel[1]) * this.wide + voxel[0];
  }

  draw() {
    if (!this.scan) return;
    this.mark();
    PLANES.forEach((plane, i) => this.drawPlane(plane, this.canvases[i]));
    this.describe();
  }

  drawPlane(plane, canvas) {
    const [wide, tall] = [this.size(plane.across), this.size(plane.up)];
    const small = document.createElement("canvas");
    [small.width, small.height] = [wide, tall];
    const pixels = new ImageData(wide, tall);
    for (let up = 0; up < tall; up++) for (let across = 0; across < wide; across++)
      this.paint(this.locate(plane, across, up), pixels.data, 4 * ((tall - 1 - up) * wide + across));
    small.getContext("2d").putImageData(pixels, 0, 0);
    const ratio = window.devicePixelRatio || 1;
    [canvas.width, canvas.height] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio].map(Math.round);
    const context = canvas.getContext("2d");
    const [sx, sy] = [canvas.width / wide, canvas.height / tall];
    context.save();
    if (this.flipped(plane)) { context.translate(canvas.width, 0); context.scale(-1, 1); }
    context.imageSmoothingEnabled = true;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    const toX = across => (across + 0.5) * sx, toY = up => (tall - up - 0.5) * sy;
    if (this.lines && this.mode !== "reconstruction") {
      if (this.mode === "anomaly map") this.trace(context, plane, this.excess, -0.5, this.palette.border, toX, toY);
      if (this.packed.lesion) this.trace(context, plane, this.lesion, 127, this.palette.lesion, toX, toY);
    }
    context.lineWidth = ratio;
    context.strokeStyle = "rgba(120, 255, 120, 0.55)";
    context.beginPath();
    const [x, y] = [toX(this.voxel[plane.across]), toY(this.voxel[plane.up])];
    for (const [from, to] of [[[0, y], [x - 8 * ratio, y]], [[x + 8 * ratio, y], [canvas.width, y]],
      [[x, 0], [x, y - 8 * ratio]], [[x, y + 8 * ratio], [x, canvas.height]]]) {
      context.moveTo(...from);
      context.lineTo(...to);
    }
    context.stroke();
    context.restore();
    this.write(context, plane, canvas, ratio, toX, toY);
  }

  // lines around what is above a level, by marching through the squares between four neighbours
  trace(context, plane, values, level, colour, toX, toY) {
    const [wide, tall] = [this.size(plane.across), this.size(plane.up)];
    context.beginPath();
    for (let up = 0; up < tall - 1; up++) for (let across = 0; across < wide - 1; across++) {
      const corners = [[across, up], [across + 1, up], [across + 1, up + 1], [across, up + 1]];
      const heights = corners.map(corner => values[this.locate(plane, ...corner)] - level);
      const crossed = [];
      for (let i = 0; i < 4; i++) {
        const [a, b] = [heights[i], heights[(i + 1) % 4]];
        if (a > 0 === b > 0) continue;
        const [from, to] = [corners[i], corners[(i + 1) % 4]];
        crossed.push([from[0] + (to[0] - from[0]) * a / (a - b), from[1] + (to[1] - from[1]) * a / (a - b)]);
      }
      for (let i = 0; i + 1 < crossed.length; i += 2) {
        context.moveTo(toX(crossed[i][0]), toY(crossed[i][1]));
        context.lineTo(toX(crossed[i + 1][0]), toY(crossed[i + 1][1]));
      }
    }
    const ratio = window.devicePixelRatio || 1;
    for (const [style, width] of [["rgba(0, 0, 0, 0.6)", 3], [colour, 1.5]]) {
      Object.assign(context, { strokeStyle: style, lineWidth: width * ratio });
      context.stroke();
    }
  }

  write(context, plane, canvas, ratio, toX, toY) {
    Object.assign(context, { font: `bold ${13 * ratio}px system-ui, sans-serif`, textAlign: "center",
      textBaseline: "middle", lineWidth: 3 * ratio, strokeStyle: "black", fillStyle: "white" });
    const put = (text, x, y) => { context.strokeText(text, x, y); context.fillText(text, x, y); };
    const [low, high, bottom, top] = plane.ends;
    const margin = 9 * ratio;
    put(this.flipped(plane) ? high : low, margin, canvas.height / 2);
    put(this.flipped(plane) ? low : high, canvas.width - margin, canvas.height / 2);
    put(top, canvas.width / 2, margin);
    put(bottom, canvas.width / 2, canvas.height - margin);
    if (!this.lines) return;
    for (const { number, voxel } of this.packed.regions) {
      if (Math.abs(voxel[plane.through] - this.voxel[plane.through]) > 2) continue;
      const x = toX(voxel[plane.across]);
      put(String(number), this.flipped(plane) ? canvas.width - x : x, toY(voxel[plane.up]));
    }
  }

  describe() {
    const { packed, palette } = this;
    const mm = packed.affine.map(row => Math.round(row[3] + row[0] * this.voxel[0] + row[1] * this.voxel[1]
      + row[2] * this.voxel[2]) || 0);
    const index = this.locate(PLANES[0], this.voxel[0], this.voxel[1]);
    const words = [`x ${mm[0]}, y ${mm[1]}, z ${mm[2]} mm`, packed.slices[this.voxel[2]].split(", ")[1]];
    if (this.code[index]) {
      const value = this.scan[index] / 255, residual = (this.residual[index] - 128) / palette.residual_steps;
      const times = 2 ** this.doublings(this.code[index] + 0.5);
      const least = this.code[index] === 1 ? "under " : "";
      words.push(`scan ${value.toFixed(2)}`, `reconstruction ${(value - residual).toFixed(2)}`,
        `residual ${residual.toFixed(2).replace(/^-(0\.00)$/, "$1")}`,
        `anomaly ${least}${(times * packed.threshold).toPrecision(3)}, ${times.toPrecision(2)} times the threshold`);
    } else words.push("not scored");
    this.root.querySelector(".values").textContent = words.join(" · ");
    const border = 2 ** this.threshold;
    this.root.querySelector("output").textContent = (border * packed.threshold).toPrecision(3)
      + (this.threshold ? `, ${border.toPrecision(2)} times the threshold` : ", the threshold");
    for (const input of this.root.querySelectorAll(".controls input")) {
      if (input.type === "radio") input.checked = input.value === this.mode;
      else if (input.type === "checkbox") input.checked = this[input.name];
      else input.value = this[input.name];
    }
  }
}
