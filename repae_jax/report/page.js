"use strict";
// Everything comes from the JSON in #data and enters the page as text nodes and attributes, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const COLORS = 8;
const view = { range: null, log: false, smooth: 5, hidden: new Set() };

// ---- building blocks ---------------------------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "color") node.style.setProperty("--color", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const colorOf = (index) => `var(--run${index % COLORS})`;
const swatch = (index) => el("span", { class: "swatch", color: colorOf(index), "aria-hidden": "true" });
const runLabel = (index) => (runs.length > 1 ? [swatch(index), runs[index].name] : []);

function number(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (Number.isInteger(value) && size < 1e12) return value.toLocaleString("en-US");
  if (size >= 1e3 && size < 1e7) return Number(value.toFixed(1)).toLocaleString("en-US");
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  const units = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]];
  const first = Math.max(0, units.findIndex(([, size]) => seconds >= size));
  if (seconds < 1) return `${number(seconds)} s`;
  const [name, size] = units[first];
  const whole = Math.floor(seconds / size);
  const next = units[first + 1];
  const rest = next ? Math.round((seconds - whole * size) / next[1]) : 0;
  return rest ? `${whole} ${name} ${rest} ${next[0]}` : `${whole} ${name}`;
}

const moment = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

// ---- header ------------------------------------------------------------------------------------------------------------

function header() {
  document.querySelector("header").append(
    el("h1", {}, data.heading || (runs.length === 1 ? runs[0].name : `${runs.length} runs compared`)),
    el("div", { class: "soft small" }, `Training report, written ${moment(data.written)}`),
    el("div", { class: "runs" }, runs.map(runCard)),
    ...messages("Could not be read", "problems"),
    ...messages("Not healthy", "warnings"),
  );
}

function messages(title, field) {
  const texts = runs.flatMap((run) => run[field].map((text) => (runs.length > 1 ? `${run.name}: ${text}` : text)));
  if (!texts.length) return [];
  return [el("div", { class: "box", role: "note" }, el("strong", {}, title),
    el("ul", {}, texts.slice(0, 20).map((text) => el("li", {}, text)),
      texts.length > 20 ? el("li", {}, `and ${texts.length - 20} more`) : null))];
}

function runCard(run, index) {
  const cost = run.cost;
  const share = cost.total ? Math.min(1, (cost.step || 0) / cost.total) : null;
  const facts = [];
  if (cost.step !== undefined) facts.push(`step ${number(cost.step)}${cost.total ? ` of ${number(cost.total)}` : ""}`);
  if (cost.state === "running" && cost.eta_seconds !== undefined) facts.push(`about ${duration(cost.eta_seconds)} left`);
  if (cost.updated !== undefined) facts.push(`last update ${moment(cost.updated)}`);
  if (run.config === null) facts.push("no checkpoint yet");
  const bar = share === null ? null : el("div", {
    class: "bar", role: "progressbar", "aria-label": `Steps done of ${run.name}`, "aria-valuemin": 0, "aria-valuemax": 100,
    "aria-valuenow": Math.round(share * 100),
  }, el("i"));
  if (bar) bar.firstChild.style.width = `${share * 100}%`;
  return el("div", { class: "card", color: colorOf(index) },
    el("div", { class: "run-name" }, swatch(index), el("span", {}, run.name, run.job ? el("span", { class: "soft" }, ` ${run.job}`) : null),
      cost.state ? el("span", { class: `state ${cost.state}` }, cost.state) : null),
    bar, el("div", { class: "figures" }, facts.map((fact) => el("span", {}, fact))),
    el("div", { class: "path" }, run.path));
}

// ---- curves ------------------------------------------------------------------------------------------------------------

const charts = [];
const MARGIN = { left: 52, right: 10, top: 8, bottom: 22 };

/** Mean of the finite values within `half` steps of each point. */
function smoothed(steps, values, half) {
  if (!(half > 0)) return values;
  const result = new Array(values.length);
  let first = 0, next = 0, sum = 0, count = 0;
  for (let i = 0; i < values.length; i++) {
    while (next < steps.length && steps[next] <= steps[i] + half) {
      if (values[next] !== null) { sum += values[next]; count++; }
      next++;
    }
    while (steps[first] < steps[i] - half) {
      if (values[first] !== null) { sum -= values[first]; count--; }
      first++;
    }
    result[i] = values[i] === null || !count ? null : sum / count;
  }
  return result;
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough) || 10 * power;
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) if (factor * 10 ** power >= low && factor * 10 ** power <= high) ticks.push(factor * 10 ** power);
  if (ticks.length > 6) {
    const powers = ticks.filter((tick) => Math.abs(Math.log10(tick) - Math.round(Math.log10(tick))) < 1e-9);
    const every = Math.ceil(powers.length / 6);
    if (powers.length > 1) return powers.filter((_, i) => i % every === 0);
  }
  return ticks.length > 1 ? ticks : linearTicks(low, high, 4).filter((tick) => tick > 0);
}

function stepLabel(step) {
  if (Math.abs(step) >= 1e6) return `${Number((step / 1e6).toPrecision(6))}M`;
  return Math.abs(step) >= 1e4 ? `${Number((step / 1e3).toPrecision(6))}k` : String(Number(step.toPrecision(6)));
}

class Chart {
  constructor(metric, title, curves) {
    this.curves = curves; // [{run, s, v, bad}]
    this.full = [Math.min(...curves.map((c) => c.s[0])), Math.max(...curves.map((c) => c.s[c.s.length - 1]))];
    if (this.full[0] > 0 && this.full[0] < this.full[1] / 10) this.full[0] = 0;
    this.positive = curves.every((curve) => curve.v.every((value) => value === null || value > 0));
    this.cursor = null;
    this.note = el("span", { class: "soft" });
    this.svg = svg("svg", { role: "img", tabindex: "0", "data-metric": metric });
    this.tip = el("div", { class: "tip", hidden: true, "aria-live": "polite" });
    this.figure = el("figure", { class: "chart" }, el("figcaption", {}, el("span", {}, title), this.note), this.svg, this.tip);
    const last = curves.map((c) => `${runs[c.run].name} ${number(c.v[c.v.length - 1])}`).join(", ");
    this.svg.setAttribute("aria-label", `${metric} over training steps; last values: ${last}. Arrow keys read values, plus and minus zoom.`);
    this.listen();
  }

  listen() {
    const on = (name, handler) => this.svg.addEventListener(name, handler);
    let start = null;
    on("pointerdown", (event) => {
      if (event.button) return;
      start = event.offsetX;
      this.svg.setPointerCapture(event.pointerId);
    });
    on("pointermove", (event) => {
      if (start !== null && Math.abs(event.offsetX - start) > 4) this.showBrush(start, event.offsetX);
      else this.showValues(this.stepAt(event.offsetX));
    });
    on("pointerup", (event) => {
      const from = start;
      start = null;
      this.brush?.remove();
      if (from === null || Math.abs(event.offsetX - from) <= 4) return;
      zoom([this.stepAt(from), this.stepAt(event.offsetX)].sort((a, b) => a - b));
    });
    on("pointercancel", () => { start = null; this.brush?.remove(); this.hideValues(); });
    on("pointerleave", () => this.hideValues());
    on("blur", () => this.hideValues());
    on("dblclick", () => zoom(null));
    on("keydown", (event) => this.key(event));
  }

  key(event) {
    const [low, high] = this.x, middle = this.cursor ?? (low + high) / 2, width = high - low;
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const sign = event.key === "ArrowRight" ? 1 : -1;
      this.showValues(Math.min(high, Math.max(low, this.cursor === null ? high : this.cursor + sign * width / 50)));
    } else if (event.key === "+" || event.key === "=") zoom([middle - width / 4, middle + width / 4]);
    else if (event.key === "-") zoom([middle - width, middle + width]);
    else if (event.key === "0" || event.key === "Escape") zoom(null);
    else return;
    event.preventDefault();
  }

  stepAt(pixel) {
    const inside = Math.min(1, Math.max(0, (pixel - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right)));
    return this.x[0] + inside * (this.x[1] - this.x[0]);
  }

  xPixel(step) { return MARGIN.left + ((step - this.x[0]) / (this.x[1] - this.x[0])) * (this.width - MARGIN.left - MARGIN.right); }

  yPixel(value) {
    const scale = this.log ? Math.log10 : (x) => x;
    const [low, high] = this.y.map(scale);
    return this.height - MARGIN.bottom - ((scale(value) - low) / (high - low)) * (this.height - MARGIN.top - MARGIN.bottom);
  }

  showBrush(from, to) {
    this.hideValues();
    this.brush?.remove();
    const [left, right] = [from, to].sort((a, b) => a - b);
    this.brush = svg("rect", { class: "brush", x: left, y: MARGIN.top, width: right - left, height: this.height - MARGIN.top - MARGIN.bottom });
    this.svg.append(this.brush);
  }

  hideValues() {
    this.tip.hidden = true;
    this.cursor = null;
    this.marks?.remove();
  }

  showValues(step) {
    const found = [];
    for (const curve of this.shown) {
      let nearest = -1;
      for (let i = 0; i < curve.s.length; i++)
        if (curve.v[i] !== null && (nearest < 0 || Math.abs(curve.s[i] - step) < Math.abs(curve.s[nearest] - step))) nearest = i;
      if (nearest >= 0) found.push([curve, nearest]);
    }
    this.hideValues();
    if (!found.length) return;
    this.cursor = step;
    const x = this.xPixel(step);
    this.marks = svg("g", { class: "marks" },
      svg("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom }),
      found.map(([curve, i]) => svg("circle", { class: "dot", r: 3.2, color: colorOf(curve.run), cx: this.xPixel(curve.s[i]), cy: this.yPixel(curve.line[i]) })));
    this.svg.append(this.marks);
    this.tip.replaceChildren(...found.map(([curve, i]) =>
      el("div", {}, swatch(curve.run), el("strong", {}, number(curve.v[i])), el("span", { class: "soft" }, `step ${number(curve.s[i])}`),
        runs.length > 1 ? runs[curve.run].name : null)));
    this.tip.hidden = false;
    const left = x < this.width / 2 ? x + 14 : x - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(4, left)}px`;
  }

  draw() {
    this.width = this.svg.clientWidth;
    this.height = this.svg.clientHeight;
    if (!this.width) return; // in a closed group
    this.log = view.log && this.positive;
    this.x = view.range || this.full;
    if (this.x[0] === this.x[1]) this.x = [this.x[0] - 1, this.x[1] + 1];
    const half = ((this.full[1] - this.full[0]) * view.smooth) / 200;
    this.shown = this.curves.filter((curve) => !view.hidden.has(curve.run))
      .map((curve) => ({ ...curve, line: smoothed(curve.s, curve.v, half) }));
    const [low, high] = this.x, bounds = [Infinity, -Infinity];
    for (const curve of this.shown)
      curve.s.forEach((step, i) => {
        if (step < low || step > high || curve.v[i] === null) return;
        bounds[0] = Math.min(bounds[0], curve.v[i], curve.line[i]);
        bounds[1] = Math.max(bounds[1], curve.v[i], curve.line[i]);
      });
    const empty = bounds[0] > bounds[1];
    this.log &&= !empty;
    const pad = this.log ? 0 : (bounds[1] - bounds[0]) * 0.05 || Math.abs(bounds[0]) * 0.05 || 1;
    this.y = empty ? [0, 1] : this.log ? [bounds[0] / 1.1, bounds[1] * 1.1] : [bounds[0] - pad, bounds[1] + pad];
    const bad = this.shown.reduce((sum, curve) => sum + curve.bad, 0);
    this.note.textContent = [view.log && !this.positive ? "linear: not all positive" : "", bad ? `${number(bad)} not finite` : "", empty ? "no values here" : ""]
      .filter(Boolean).join(" · ");
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.dataset.low = this.x[0];
    this.svg.dataset.high = this.x[1];
    this.svg.replaceChildren(...this.axes(empty), ...(empty ? [] : this.lines()));
  }

  axes(empty) {
    const right = this.width - MARGIN.right, bottom = this.height - MARGIN.bottom;
    const rows = (empty ? [] : this.log ? logTicks(...this.y) : linearTicks(...this.y, 5)).map((tick) => {
      const y = this.yPixel(tick);
      return svg("g", {}, svg("line", { class: "rule", x1: MARGIN.left, x2: right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 6, y: y + 3.5, "text-anchor": "end" }, number(tick)));
    });
    const columns = linearTicks(...this.x, Math.max(2, Math.floor(this.width / 90))).map((tick) =>
      svg("text", { class: "step", x: this.xPixel(tick), y: bottom + 15, "text-anchor": this.xPixel(tick) > right - 12 ? "end" : "middle" }, stepLabel(tick)));
    return [...rows, ...columns];
  }

  lines() {
    const [low, high] = this.x;
    const clip = `clip${charts.indexOf(this)}`;
    const group = svg("g", { "clip-path": `url(#${clip})` });
    for (const curve of this.shown) {
      const visible = curve.s.map((step, i) => i).filter((i) => // neighbors outside let the line reach the border
        (curve.s[Math.min(i + 1, curve.s.length - 1)] >= low && curve.s[Math.max(i - 1, 0)] <= high));
      const color = colorOf(curve.run), dash = curve.run >= COLORS ? "5 3" : null;
      const path = (values, kind) => {
        let text = "", pen = "M";
        for (const i of visible) {
          if (values[i] === null) { pen = "M"; continue; }
          text += `${pen}${this.xPixel(curve.s[i]).toFixed(1)},${this.yPixel(values[i]).toFixed(1)}`;
          pen = "L";
        }
        return svg("path", { class: `curve ${kind}`, color, d: text, "stroke-dasharray": dash });
      };
      if (curve.line !== curve.v) group.append(path(curve.v, "raw"));
      group.append(path(curve.line, "line"));
      if (visible.length < 4) for (const i of visible) if (curve.line[i] !== null)
        group.append(svg("circle", { class: "dot", r: 3, color, cx: this.xPixel(curve.s[i]), cy: this.yPixel(curve.line[i]) }));
    }
    const box = svg("rect", { x: MARGIN.left - 2, y: 0, width: this.width - MARGIN.left - MARGIN.right + 4, height: this.height });
    return [svg("defs", {}, svg("clipPath", { id: clip }, box)), group];
  }
}

let redrawing = false;
function redraw() {
  if (redrawing) return;
  redrawing = true;
  requestAnimationFrame(() => {
    redrawing = false;
    charts.forEach((chart) => { chart.hideValues(); chart.draw(); });
  });
}

let resetButton = null;
function zoom(range) {
  const full = [Math.min(...charts.map((chart) => chart.full[0])), Math.max(...charts.map((chart) => chart.full[1]))];
  if (range) range = [Math.max(full[0], range[0]), Math.min(full[1], range[1])];
  if (range && range[1] - range[0] < 1) range = [Math.floor(range[0]), Math.floor(range[0]) + 1];
  view.range = range && range[0] <= full[0] && range[1] >= full[1] ? null : range;
  resetButton.disabled = !view.range;
  redraw();
}

const SCORES = { fid: "FID", mind: "MIND", kid: "KID" };
/** Name of a score that training logs, such as fid/5000_samples; null of another metric. */
function scoreName(metric) {
  const [, score, count] = metric.match(/^(\w+)\/(\d+)_samples$/) || [];
  return score in SCORES ? `${SCORES[score]} of ${number(Number(count))} samples` : null;
}

const GROUPS = { scores: "Scores", vae: "VAE", sit: "SiT", disc: "Discriminator", latents: "Latents", grad_norm: "Gradient norms", "": "Run" };
const OPEN = ["vae", "sit", "disc", "eval", "evaluation", "scores"];
const LATER = ["latents", "grad_norm", ""];

function curvesSection() {
  const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  if (!metrics.length) return null;
  const groups = new Map(), still = [];
  for (const metric of metrics) {
    const curves = runs.map((run, index) => ({ run: index, ...run.curves[metric] })).filter((curve) => curve.s);
    const values = new Set(curves.flatMap((curve) => curve.v));
    const longest = Math.max(...curves.map((curve) => curve.s.length));
    if (values.size === 1 && longest > 1) { still.push(`${metric} = ${number([...values][0])}`); continue; }
    const slash = metric.indexOf("/"), score = scoreName(metric), group = score ? "scores" : metric.slice(0, Math.max(slash, 0));
    if (!groups.has(group)) groups.set(group, []);
    const chart = new Chart(metric, score || metric.slice(slash + 1), curves);
    charts.push(chart);
    groups.get(group).push(chart);
  }
  const place = (name) => (OPEN.includes(name) ? OPEN.indexOf(name) : LATER.includes(name) ? 100 + LATER.indexOf(name) : 50);
  const sorted = [...groups].sort(([a], [b]) => place(a) - place(b) || a.localeCompare(b));
  const smoothing = el("output", {}, "5 %");
  resetButton = el("button", { type: "button", id: "reset-zoom", disabled: true, onclick: () => zoom(null) }, "Reset zoom");
  const tools = el("div", { class: "tools" },
    el("label", {}, "Smoothing", el("input", { type: "range", id: "smoothing", min: 0, max: 30, value: view.smooth,
      oninput: (event) => { view.smooth = Number(event.target.value); smoothing.textContent = `${view.smooth} %`; redraw(); } }), smoothing),
    el("label", {}, el("input", { type: "checkbox", id: "log-scale", onchange: (event) => { view.log = event.target.checked; redraw(); } }), "Log scale"),
    resetButton,
    el("span", { class: "soft small" }, "Drag across a chart to zoom all of them, double-click to go back."));
  return el("section", { id: "curves" }, el("h2", {}, "Curves"), tools, runs.length > 1 ? el("div", { class: "tools" }, legend()) : null,
    sorted.map(([name, members]) => el("details", { class: "group", open: place(name) < 100 || sorted.length < 3, ontoggle: redraw },
      el("summary", {}, GROUPS[name] || name, el("span", { class: "soft small" }, `  ${members.length}`)),
      el("div", { class: "charts" }, members.map((chart) => chart.figure)))),
    still.length ? el("p", { class: "soft small" }, `Constant, not drawn: ${still.join(", ")}.`) : null);
}

function legend() {
  return el("div", { class: "legend", role: "group", "aria-label": "Runs shown in the charts" }, runs.map((run, index) =>
    el("button", { type: "button", "aria-pressed": "true", onclick: (event) => {
      if (!view.hidden.delete(index)) view.hidden.add(index);
      event.currentTarget.setAttribute("aria-pressed", String(!view.hidden.has(index)));
      redraw();
    } }, swatch(index), run.name)));
}

// ---- pictures ----------------------------------------------------------------------------------------------------------

const dialog = el("dialog", { "aria-label": "Enlarged picture", onclick: () => dialog.close() });

/** A picture that a click enlarges; `set` shows another one in its place. */
function pictureButton(picture) {
  const image = el("img");
  const button = el("button", { type: "button", class: "picture-button", onclick: () => {
    dialog.replaceChildren(el("img", { src: image.src, alt: image.alt, class: image.naturalWidth > 700 ? "photo" : null }));
    dialog.showModal();
  } }, image);
  button.set = (other) => {
    const enlarged = Math.max(1, Math.floor(380 / other.width)); // pictures of a few pixels are looked at pixel by pixel
    image.className = enlarged > 1 ? "pixels" : "";
    image.src = other.src;
    image.alt = other.alt;
    image.width = other.width * enlarged;
    image.height = other.height * enlarged;
    button.setAttribute("aria-label", `${other.alt}; enlarge`);
  };
  button.set(picture);
  return button;
}

/** One slider for all runs: each shows its newest picture up to the chosen step. */
function seriesSection(kind, [title, explanation]) {
  const members = runs.map((run, index) => ({ index, list: run.series[kind] })).filter((member) => member.list.length);
  if (!members.length) return null;
  const steps = [...new Set(members.flatMap((member) => member.list.map((one) => one.step)))].sort((a, b) => a - b);
  const output = el("output", { for: `${kind}-time` });
  const figures = members.map((member) => {
    const caption = el("span", { class: "soft" });
    const button = pictureButton(member.list[0].picture);
    const show = (step) => {
      const current = member.list.filter((one) => one.step <= step).pop() || member.list[0];
      button.set(current.picture);
      caption.textContent = current.step === step ? "" : `at step ${number(current.step)}`;
    };
    return { show, node: el("figure", {}, el("figcaption", {}, runLabel(member.index), caption), button) };
  });
  const slider = el("input", { type: "range", id: `${kind}-time`, min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": `${title}: training step` });
  const show = () => {
    const step = steps[Number(slider.value)];
    output.textContent = `step ${number(step)}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    figures.forEach((figure) => figure.show(step));
  };
  slider.addEventListener("input", show);
  let timer = null;
  const play = el("button", { type: "button", onclick: () => {
    if (timer) return stop();
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    play.textContent = "Pause";
    show();
    timer = setInterval(() => {
      if (Number(slider.value) >= steps.length - 1) return stop();
      slider.value = Number(slider.value) + 1;
      show();
    }, Math.max(150, Math.min(700, 8000 / steps.length)));
  } }, "Play");
  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
  slider.addEventListener("pointerdown", stop);
  slider.addEventListener("keydown", stop);
  show();
  return el("section", { id: kind }, el("h2", {}, title), el("p", { class: "soft small" }, explanation),
    el("div", { class: "tools time" }, steps.length > 1 ? [play, slider] : [], output),
    el("div", { class: "pictures" }, figures.map((figure) => figure.node)));
}

function fieldList(fields) {
  return el("dl", {}, Object.entries(fields).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value === null ? "none" : String(value))]));
}

function generatedSection() {
  const figures = runs.flatMap((run, index) => run.generated.map((one) => el("figure", {},
    el("figcaption", {}, runLabel(index), el("span", { class: "line soft" }, one.name)), pictureButton(one.picture),
    Object.keys(one.settings).length ? el("details", { class: "small" }, el("summary", {}, "Settings"), fieldList(one.settings)) : null)));
  if (!figures.length) return null;
  return el("section", { id: "generated" }, el("h2", {}, "Generated images"), el("div", { class: "pictures" }, figures));
}

// ---- tables ------------------------------------------------------------------------------------------------------------

const table = (head, rows) => el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" },
  el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)));
const th = (text, kind) => el("th", { scope: "col", class: kind }, text);

const DIRECTIONS = [[/_std$/, ""], [/fid|fd_|fdr6|kid|mind|cmmd|memorized|lpips|equivariance|mse|l1/i, " ↓"], [/psnr|ssim|precision|recall|inception|(^|[_/])is($|[_/])/i, " ↑"]];
const arrow = (metric) => (DIRECTIONS.find(([pattern]) => pattern.test(metric)) || [null, ""])[1];

function evaluationTable([kind, title]) {
  const rows = runs.flatMap((run, index) => run.evaluations.filter((one) => one.kind === kind).map((one) => ({ ...one, index })));
  if (!rows.length) return [];
  const metrics = [...new Set(rows.flatMap((one) => Object.keys(one.metrics)))].filter((metric) => !metric.endsWith("_stderr"));
  const interval = (one, metric) => `${metric}_stderr` in one.metrics ? ` ± ${number(1.96 * one.metrics[`${metric}_stderr`])}` : "";
  const lines = rows.map((one) => el("tr", { title: Object.entries(one.protocol).map(([name, value]) => `${name}: ${value}`).join("\n") },
    runs.length > 1 ? el("th", { scope: "row" }, el("span", { class: "run-name" }, runLabel(one.index))) : null,
    el("td", { class: "number" }, one.step === null ? "–" : number(one.step)),
    el("td", { class: "protocol" }, el("details", {}, el("summary", {}, one.name), fieldList(one.protocol)),
      one.warnings.map((text) => el("div", { class: "warning" }, `⚠ ${text}`))),
    metrics.map((metric) => el("td", { class: "number" }, number(one.metrics[metric]), interval(one, metric),
      metric === "fid" && one.noise ? el("div", { class: "soft small", title: "Beside the lowest FID of this protocol, with half of the difference's 95 % interval" }, one.noise) : null))));
  const head = [runs.length > 1 ? th("Run") : null, th("Step", "number"), th("Protocol"), ...metrics.map((metric) => th(metric + arrow(metric), "number"))];
  const pictures = rows.filter((one) => one.picture).map((one) => el("figure", {},
    el("figcaption", {}, runLabel(one.index), el("span", { class: "line soft" }, one.name)), pictureButton(one.picture)));
  return [el("h3", {}, title), table(head.filter(Boolean), lines),
    pictures.length ? el("details", { class: "fields" }, el("summary", {}, `Pictures of these evaluations (${pictures.length})`), el("div", { class: "pictures" }, pictures)) : null];
}

/** For each logged FID a table with a row for each k, and a column for each run. */
function epochsTables() {
  const rows = runs.flatMap((run, index) => run.epochs_to_fid.map((row) => ({ ...row, index })));
  if (!rows.length) return [];
  const members = [...new Set(rows.map((row) => row.index))];
  const cell = (row) => el("td", { class: "number" }, !row ? "–" : [row.epochs === null ? "" : `${number(row.epochs)} `,
    el("span", { class: "soft small" }, `step ${number(row.step)}`)]);
  const tables = [...new Set(rows.map((row) => row.curve))].map((curve) => {
    const of = rows.filter((row) => row.curve === curve);
    const thresholds = [...new Set(of.map((row) => row.k))].sort((a, b) => b - a);
    const lines = thresholds.map((k) => el("tr", {}, el("th", { scope: "row" }, number(k)),
      members.map((index) => cell(of.find((row) => row.k === k && row.index === index)))));
    const heads = members.map((index) => th(runs.length > 1 ? el("span", { class: "run-name" }, runLabel(index)) : "Epochs", "number"));
    return table([th(`k, ${scoreName(curve) || curve}`), ...heads], lines);
  });
  return [el("h3", {}, "Epochs until FID is below k (EP_FID@k)"), ...tables];
}

function metricsSection() {
  const parts = [...Object.entries(data.kinds).flatMap(evaluationTable), ...epochsTables()];
  if (!parts.length) return null;
  return el("section", { id: "metrics" }, el("h2", {}, "Evaluations"),
    el("p", { class: "soft small" }, "Numbers compare only where their protocols agree: open a row's name, or hover over the row. After ± is half of a 95 % interval."), parts);
}

function latentsSection() {
  const rows = runs.flatMap((run, index) => run.analysis.models.map((model) => ({ ...model, index })));
  const pictures = runs.flatMap((run, index) => run.analysis.pictures.map(({ picture }) => el("figure", {},
    el("figcaption", {}, runLabel(index), el("span", { class: "line" }, picture.alt)), pictureButton(picture))));
  if (!rows.length && !pictures.length) return null;
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.numbers)))];
  const head = [th("Model"), ...rows.map((row) => el("th", { scope: "col", class: "number", title: row.source }, runs.length > 1 ? `${runs[row.index].name}: ` : "",
    String(row.name ?? "?"), row.step === null ? "" : ` at ${number(row.step)}`))];
  const lines = names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), rows.map((row) => el("td", { class: "number" }, number(row.numbers[name])))));
  const about = runs.flatMap((run, index) => Object.keys(run.analysis.protocol).length
    ? [el("details", { class: "small" }, el("summary", {}, runLabel(index), "Protocol"), fieldList(run.analysis.protocol)),
      ...run.analysis.warnings.map((text) => el("div", { class: "warning" }, `⚠ ${text}`))] : []);
  const agreements = runs.flatMap((run, index) => run.analysis.cknna.map((row) => el("tr", {}, el("th", { scope: "row" }, runs.length > 1 ? `${runs[index].name}: ` : "", String(row.model ?? "?")),
    el("td", {}, row.encoder), el("td", {}, row.measure), [row.timestep, row.best, row.block, row.last].map((value) => el("td", { class: "number" }, number(value))))));
  const columns = [th("Model"), th("Encoder"), th("Measure"), ...["t", "best block's", "block", "last block's"].map((text) => th(text, "number"))];
  return el("section", { id: "latents" }, el("h2", {}, "Latents"), names.length ? table(head, lines) : null, about,
    agreements.length ? el("details", { class: "fields" }, el("summary", {}, `The SiT's hidden states and encoders (${agreements.length})`), table(columns, agreements)) : null,
    pictures.length ? el("div", { class: "pictures fields" }, pictures) : null);
}

function configTable(names, known) {
  const show = (value) => (value === undefined ? "–" : value === "" ? "''" : JSON.stringify(value).replace(/^"|"$/g, ""));
  return table([th("Field"), ...known.map((index) => th(runs[index].name))], names.map((name) => el("tr", {}, el("th", { scope: "row", class: "value" }, name),
    known.map((index) => {
      const value = runs[index].config[name];
      const other = runs[index].config && value !== runs[known[0]].config[name];
      return el("td", { class: `value${other ? " other" : ""}` }, show(value));
    }))));
}

function configSection() {
  const known = runs.map((run, index) => index).filter((index) => runs[index].config);
  if (!known.length) return null;
  const names = [...new Set(known.flatMap((index) => Object.keys(runs[index].config)))].sort();
  const compared = known.length < 2 ? [] : data.differing.length
    ? [el("p", { class: "soft small" }, `${data.differing.length} of ${names.length} fields differ; marked where a run differs from the first.`), configTable(data.differing, known)]
    : [el("p", {}, "All fields are equal.")];
  return el("section", { id: "config" }, el("h2", {}, "Config"), compared,
    el("details", { class: "fields" }, el("summary", {}, `All ${names.length} fields`), configTable(names, known)));
}

function costSection() {
  const rows = [
    ["Images per second", "median", (c) => c.images_per_second, number],
    ["Seconds per step", "median", (c) => c.seconds_per_step, number],
    ["MFU", "share of the peak, median", (c) => c.mfu, (x) => `${number(100 * x)} %`],
    ["TFLOP/s per device", "that training needs, without recomputation, median", (c) => c.tflops_per_device, number],
    ["Waiting for input", "share of the time, median", (c) => c.input_wait, (x) => `${number(100 * x)} %`],
    ["Images seen", "steps times batch", (c) => c.images, number],
    ["Training time", "steps times seconds per step, without compilation and pictures", (c) => c.training_seconds, duration],
    ["Elapsed time", "first to last line of metrics, without pauses of over an hour", (c) => c.elapsed_seconds, duration],
    ["Pauses", "of over an hour, left out of the elapsed time", (c) => c.pauses || undefined, number],
    ["Devices", "as in the newest checkpoint", (c) => c.devices, number],
    ["Device hours", "elapsed time times devices", (c) => c.device_hours, (x) => (x < 0.995 ? `${number(x)} h (${duration(x * 3600)})` : `${number(x)} h`)],
  ].filter(([, , get]) => runs.some((run) => get(run.cost) !== undefined));
  if (!rows.length) return null;
  return el("section", { id: "cost" }, el("h2", {}, "Cost"), table([th(""), ...runs.map((run, index) => el("th", { scope: "col", class: "number" }, runs.length > 1 ? run.name : ""))],
    rows.map(([name, meaning, get, show]) => el("tr", {}, el("th", { scope: "row" }, name, el("div", { class: "soft small" }, meaning)),
      runs.map((run) => el("td", { class: "number" }, get(run.cost) === undefined ? "–" : show(get(run.cost))))))));
}

function footer() {
  return el("footer", {}, data.notes.map((note) => el("div", {}, note)),
    el("div", {}, "Written by repae_jax.report. Everything is in this file; nothing is loaded from elsewhere."));
}

// ---- the page ----------------------------------------------------------------------------------------------------------

const sections = [
  curvesSection(), ...Object.entries(data.titles).map(([kind, texts]) => seriesSection(kind, texts)), generatedSection(), metricsSection(),
  latentsSection(), configSection(), costSection(),
].filter(Boolean);
header();
document.querySelector("nav").append(el("div", {}, sections.map((section) => el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent))));
document.querySelector("main").append(...sections, footer());
document.body.append(dialog);
charts.forEach((chart) => chart.draw());
addEventListener("resize", redraw);
