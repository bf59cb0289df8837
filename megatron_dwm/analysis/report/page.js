"use strict";
// Draws the page's figures in the colors of the reader's theme, makes them readable and zoomable by touch and keyboard,
// and reloads the page of a running job. Everything is in the page: nothing is fetched.

const content = JSON.parse(document.getElementById("data").textContent);
const isDark = matchMedia("(prefers-color-scheme: dark)");
// On a touch screen dragging scrolls the page. The buttons zoom a figure; dragging then moves what is zoomed.
const isTouch = matchMedia("(pointer: coarse)").matches;
const config = {displayModeBar: false, doubleClick: "reset"};
let lastTouched = 0;

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

// Figures are written in the colors of a light page.
function recolored(value) {
  if (Array.isArray(value)) return value.map(recolored);
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, recolored(item)]));
  }
  if (!isDark.matches || typeof value !== "string") return value;
  const parts = value.match(/^rgba\((\d+),(\d+),(\d+),([\d.]+)\)$/);
  if (parts === null) return content.dark[value] ?? value;
  const hex = "#" + parts.slice(1, 4).map(part => Number(part).toString(16).padStart(2, "0")).join("");
  const dark = content.dark[hex];
  if (dark === undefined) return value;
  const [red, green, blue] = [1, 3, 5].map(start => parseInt(dark.slice(start, start + 2), 16));
  return `rgba(${red},${green},${blue},${parts[4]})`;
}

class Chart {
  constructor(element) {
    this.element = element;
    this.trace = -1;
    this.point = 0;
  }

  async draw() {
    const {data, layout} = recolored(content.figures[this.element.dataset.figure]);
    layout.width = this.element.clientWidth;
    if (isTouch) layout.dragmode = false;
    // A long legend takes no height from the curves.
    const names = layout.showlegend ? data.filter(trace => trace.showlegend !== false).length : 0;
    const rows = Math.ceil(names / Math.max(1, Math.floor(layout.width / 260)));
    layout.height += 18 * Math.max(0, rows - 3);
    if (layout.width < 600) {
      layout.hovermode = "closest";
      layout.margin = {...layout.margin, l: 34, r: 8};
    }
    await Plotly.react(this.element, data, layout, config);
  }

  resize() {
    if (this.element.clientWidth !== this.element.layout.width) return this.draw();
  }

  zoom(factor) {
    const {range, type} = this.element._fullLayout.xaxis;
    if (type !== "linear") return;
    const middle = (range[0] + range[1]) / 2, half = (range[1] - range[0]) / 2 * factor;
    const mode = isTouch ? {dragmode: "pan"} : {};
    return Plotly.relayout(this.element, {"xaxis.range": [middle - half, middle + half], ...mode});
  }

  save() {
    const {figure} = this.element.dataset, paper = getComputedStyle(document.documentElement).getPropertyValue("--card");
    const {data, layout} = this.element;
    const picture = {data, layout: {...layout, paper_bgcolor: paper.trim()}};
    return Plotly.downloadImage(picture, {format: "png", scale: 2, filename: figure, width: layout.width, height: layout.height});
  }

  readable() {
    const isRead = trace => trace.hoverinfo !== "skip" && trace.visible !== "legendonly" && trace.x?.length > 0;
    return this.element.data.flatMap((trace, number) => isRead(trace) ? [number] : []);
  }

  show() {
    const {x, y, name} = this.element.data[this.trace];
    this.point = Math.max(0, Math.min(x.length - 1, this.point));
    Plotly.Fx.hover(this.element, [{curveNumber: this.trace, pointNumber: this.point}]);
    document.getElementById("spoken").textContent = `${name}: ${y[this.point]} at ${x[this.point]}`;
  }

  step(by) {
    const known = this.readable();
    if (known.length === 0) return;
    if (this.trace < 0) [this.trace, this.point] = [known[0], by > 0 ? -1 : Infinity];
    this.point += by;
    this.show();
  }

  change(by) {
    const known = this.readable();
    if (known.length === 0) return;
    const place = known.indexOf(this.trace);
    this.trace = known[(place < 0 ? 0 : place + by + known.length) % known.length];
    this.show();
  }

  // Reads values with the arrows, zooms with + and -, goes back with 0.
  listen() {
    const keys = {
      ArrowRight: () => this.step(1),
      ArrowLeft: () => this.step(-1),
      ArrowDown: () => this.change(1),
      ArrowUp: () => this.change(-1),
      "+": () => this.zoom(1 / 1.5),
      "=": () => this.zoom(1 / 1.5),
      "-": () => this.zoom(1.5),
      "0": () => this.draw(),
      Escape: () => Plotly.Fx.unhover(this.element),
    };
    this.element.addEventListener("keydown", event => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      lastTouched = Date.now();
      keys[event.key]();
    });
    this.element.addEventListener("blur", () => Plotly.Fx.unhover(this.element));
    this.element.on("plotly_relayout", () => { lastTouched = Date.now(); });
    const actions = {in: keys["+"], out: keys["-"], reset: keys["0"], save: () => this.save()};
    for (const button of document.querySelectorAll(`.buttons[data-figure="${this.element.dataset.figure}"] button`)) {
      button.addEventListener("click", () => actions[button.dataset.action]());
    }
  }
}

// The page does not reload while somebody uses a figure: it waits until nothing has been touched for a while.
function reloadLater(seconds) {
  setTimeout(() => {
    if (document.hidden || Date.now() - lastTouched < 1000 * seconds) reloadLater(seconds);
    else location.reload();
  }, 1000 * seconds);
}

async function start() {
  await loadPlotly();
  const charts = [...document.querySelectorAll(".chart")].map(element => new Chart(element));
  for (const chart of charts) {
    await chart.draw();
    chart.listen();
  }
  isDark.addEventListener("change", () => charts.forEach(chart => chart.draw()));
  addEventListener("resize", () => charts.forEach(chart => chart.resize()));
  document.body.dataset.drawn = charts.length;
}

start().catch(error => {
  document.getElementById("undrawn").hidden = false;
  console.error(error);
});
if (content.reload !== null) reloadLater(content.reload);
