// Charts: a card for each, drawn by Plotly, with the same numbers as a table.

/* global Plotly */

import * as figures from "./figures.js";

const MOST_ROWS = 500; // of a table, the newest
const MOST_MARKERS = 14; // on a line

// Okabe and Ito's colours, which colour-blind people can tell apart. Those that would be faint on the
// ground are darker or lighter than in the original.
const COLOURS = {
  light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8a7a00"],
  dark: ["#56B4E9", "#E69F00", "#00b886", "#CC79A7", "#ffffff", "#F0E442", "#e8743b", "#3f97d6"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
// SVG dash arrays of a swatch, in the order of DASHES.
const SWATCH_DASHES = ["", "5 3", "1.5 2.5", "6 2 1.5 2", "9 3", "9 2 1.5 2"];
// Of time axes; the second line is shown where it changes.
const TICKS = [
  { dtickrange: [null, 60000], value: "%H:%M:%S\n%Y-%m-%d" },
  { dtickrange: [60000, 86400000], value: "%H:%M\n%Y-%m-%d" },
  { dtickrange: [86400000, null], value: "%m-%d\n%Y" },
];
const MARKERS = [
  "circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down",
];
const SWATCH_MARKERS = ["●", "■", "◆", "▲", "✚", "✖", "★", "▼"];

/** The look of a model by its place: {colour, dash, marker, width} and those of its swatch. */
export function look(place, isDark) {
  const colours = COLOURS[isDark ? "dark" : "light"];
  return {
    colour: colours[place % colours.length],
    dash: DASHES[place % DASHES.length],
    marker: MARKERS[place % MARKERS.length],
    width: place === 0 ? 2.6 : 1.6,
    swatchDash: SWATCH_DASHES[place % DASHES.length],
    swatchMarker: SWATCH_MARKERS[place % MARKERS.length],
  };
}

export const REFERENCE_LOOKS = {
  "best possible": { dash: "dot", swatchDash: "1.5 2.5", width: 1.2 },
  constant: { dash: "dash", swatchDash: "5 3", width: 1.2 },
};

/** The colours of the page as it is now, from the variables of its style sheet. */
export function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    isDark: colour("scheme") === "dark",
    ink: colour("ink"), muted: colour("muted"), grid: colour("line"), card: colour("card"),
    band: colour("band"), font: style.fontFamily || "sans-serif",
  };
}

// -- traces --------------------------------------------------------------------------------------

/**
 * The traces of one line. Final points are filled and joined by the line's own dash; what is
 * provisional is hollow and joined by thin dots.
 */
export function lineTraces(series, { name, colour, dash, marker, width, hover, card }) {
  const final = series.filter((point) => !point.provisional);
  const tail = series.filter((point) => point.provisional);
  const common = { type: "scatter", legendgroup: name, showlegend: false, hovertemplate: hover };
  const traces = [];
  if (final.length) {
    traces.push({
      ...common, name,
      x: final.map((point) => point.time), y: final.map((point) => point.value),
      customdata: final.map((point) => point.from ?? ""),
      mode: marker ? "lines+markers" : "lines", connectgaps: false,
      line: { color: colour, dash, width },
      marker: { color: colour, symbol: marker, size: 6, maxdisplayed: MOST_MARKERS },
    });
  }
  if (tail.length) {
    const joined = [...final.slice(-1), ...tail];
    traces.push({
      ...common, name: `${name} (provisional)`,
      x: joined.map((point) => point.time), y: joined.map((point) => point.value),
      mode: marker ? "lines+markers" : "lines",
      line: { color: colour, dash: "dot", width: 1 },
      marker: {
        symbol: marker, size: joined.map((point) => (point.provisional ? 8 : 0)),
        color: card, line: { color: colour, width: 1.6 },
      },
      hoverinfo: "skip", hovertemplate: undefined,
    });
    // The hover of the join would repeat the last final point.
    traces.push({
      ...common, name: `${name} (provisional)`, mode: "markers",
      x: tail.map((point) => point.time), y: tail.map((point) => point.value),
      marker: { symbol: marker, size: 8, color: card, line: { color: colour, width: 1.6 } },
    });
  }
  return traces;
}

/**
 * The range of an axis that shows the newer points, if the oldest ones, from before a model has
 * learned anything, would flatten them; null if all points fit.
 */
export function focusedRange(lines, level = null) {
  const known = (part) => lines.flatMap(({ series }) => part(series))
    .flatMap((point) => [point.value, point.low ?? null, point.high ?? null])
    .filter((value) => value !== null);
  const all = known((series) => series);
  const newer = known((series) => series.slice(Math.ceil(series.length / 4)));
  if (!newer.length) return null;
  if (level !== null) newer.push(level);
  const [low, high] = [Math.min(...newer), Math.max(...newer)];
  const span = Math.max(...all, high) - Math.min(...all, low);
  if (high === low || span < 3 * (high - low)) return null;
  const margin = 0.07 * (high - low);
  return [low - margin, high + margin];
}

/** A band from low to high; points without an interval break it into pieces. */
export function bandTraces(series, colour) {
  const pieces = [];
  let piece = [];
  for (const point of [...series, { low: null, high: null }]) {
    if (point.low !== null && point.high !== null) {
      piece.push(point);
    } else if (piece.length) {
      pieces.push(piece);
      piece = [];
    }
  }
  return pieces.map((points) => ({
    type: "scatter", mode: "lines", fill: "toself", fillcolor: colour, line: { width: 0 },
    hoverinfo: "skip", showlegend: false, name: "95 % interval",
    x: [...points.map((point) => point.time), ...points.map((point) => point.time).reverse()],
    y: [...points.map((point) => point.high), ...points.map((point) => point.low).reverse()],
  }));
}

// -- a chart -------------------------------------------------------------------------------------

/** A chart in a card of its own: a title, a switch to a table, a plot and what it says when empty. */
export class Chart {
  constructor(grid, { id, title, about, unit, empty, form }) {
    Object.assign(this, { id, title, unit, form, traces: [], rows: null, width: 0 });
    this.card = element("article", { class: "card chart", id: `chart-${id}` });
    const head = element("header");
    head.append(element("h2", { id: `${id}-title` }, title));
    this.about = element("p", { class: "about" }, about);
    this.tools = element("span", { class: "tools" });
    this.button = element("button",
      { type: "button", class: "quiet", "aria-pressed": "false", "aria-controls": `${id}-table` },
      "Show as table");
    this.tools.append(this.button);
    head.append(this.tools, this.about);
    this.plot = element("div", { class: "plot", role: "img", "aria-labelledby": `${id}-title` });
    this.empty = element("p", { class: "empty" }, empty);
    this.table = element("div", { class: "scroll chart-table", id: `${id}-table`, tabindex: "0",
      role: "region", "aria-label": `${title} as a table`, hidden: "" });
    this.card.append(head, this.plot, this.empty, this.table);
    grid.append(this.card);
    this.button.addEventListener("click", () => this.showTable(this.table.hidden));
  }

  showTable(shown) {
    this.button.setAttribute("aria-pressed", String(shown));
    this.table.hidden = !shown;
    if (shown) this.fillTable();
    this.arrange();
    if (!shown) this.draw();
  }

  /** Take new data: traces, an extra layout, and a table of {heads, rows}, the oldest row first. */
  update({ traces, layout = {}, table, summary }) {
    Object.assign(this, { traces, layout, rows: table });
    this.plot.setAttribute("aria-label", `${this.title}. ${summary}`);
    this.plot.removeAttribute("aria-labelledby");
    this.arrange();
    if (this.table.hidden) this.draw();
    else this.fillTable();
  }

  arrange() {
    const isEmpty = !this.traces.some((trace) => trace.y.some((value) => value !== null));
    this.empty.hidden = !isEmpty;
    this.button.disabled = isEmpty && this.table.hidden;
    this.plot.hidden = isEmpty || !this.table.hidden;
  }

  draw() {
    if (this.plot.hidden || typeof Plotly === "undefined") return;
    Plotly.react(this.plot, this.traces, this.plotLayout(), {
      displayModeBar: false, responsive: true, doubleClick: "reset+autosize", showTips: false,
      scrollZoom: false,
    });
  }

  plotLayout() {
    const { ink, muted, grid, card, font } = theme();
    const axis = {
      spikecolor: muted, spikethickness: 1, gridcolor: grid, linecolor: grid, zeroline: false, tickcolor: grid, automargin: true,
      tickfont: { color: muted, size: 11 }, title: { font: { color: muted, size: 11 } },
    };
    const isTouch = matchMedia("(pointer: coarse)").matches;
    const { xaxis, yaxis, ...others } = this.layout ?? {};
    return {
      autosize: true, uirevision: this.id, showlegend: false, dragmode: isTouch ? false : "zoom",
      margin: { l: 8, r: 12, t: 8, b: 8 }, paper_bgcolor: card, plot_bgcolor: card,
      font: { family: font, color: ink, size: 12 }, hovermode: "x unified",
      hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink, size: 12 } },
      xaxis: {
        ...axis, type: "date", hoverformat: "%Y-%m-%d %H:%M:%S", tickformatstops: TICKS, tickangle: 0,
        nticks: 7, ...xaxis,
        title: { ...axis.title, text: xaxis?.title ?? "event time (UTC)", standoff: 8 },
      },
      yaxis: {
        ...axis, ...yaxis, title: { ...axis.title, text: this.unit, standoff: 8 },
      },
      ...others,
    };
  }

  fillTable() {
    const { heads, rows } = this.rows ?? { heads: [], rows: [] };
    const newest = rows.slice(-MOST_ROWS).reverse();
    const table = element("table");
    if (rows.length > newest.length) {
      table.append(element("caption", {},
        `The newest ${figures.count(newest.length)} of ${figures.count(rows.length)}`));
    }
    fill(table, heads, newest);
    this.table.replaceChildren(table);
  }
}

// -- elements: whatever comes from the run becomes text, never markup ----------------------------

export function element(name, attributes = {}, words) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  if (words !== undefined && words !== null) made.textContent = words;
  return made;
}

/** Fill a table: heads, and rows of texts or nodes; the first cell of a row is its head. */
export function fill(table, heads, rows, { numbersFrom = 1, rowClasses = [] } = {}) {
  const caption = table.querySelector("caption");
  const head = element("thead");
  const line = element("tr");
  heads.forEach((words, place) =>
    line.append(element("th", { scope: "col", class: place >= numbersFrom ? "number" : "" }, words)));
  head.append(line);
  const body = element("tbody");
  rows.forEach((cells, row) => {
    const made = element("tr", rowClasses[row] ? { class: rowClasses[row] } : {});
    cells.forEach((cell, place) => {
      const kind = place >= numbersFrom ? "number" : "";
      const box = place
        ? element("td", { class: kind })
        : element("th", { scope: "row", class: kind });
      box.append(cell instanceof Node ? cell : document.createTextNode(cell));
      made.append(box);
    });
    body.append(made);
  });
  table.replaceChildren(...(caption ? [caption] : []), head, body);
}

const SVG = "http://www.w3.org/2000/svg";

/** A short piece of a model's line with its marker. */
export function swatch({ colour, swatchDash, swatchMarker, width }) {
  const drawing = document.createElementNS(SVG, "svg");
  const set = (node, attributes) =>
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  set(drawing, { width: 26, height: 12, viewBox: "0 0 26 12", "aria-hidden": "true" });
  const line = document.createElementNS(SVG, "line");
  set(line, { x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour, "stroke-width": width });
  if (swatchDash) line.setAttribute("stroke-dasharray", swatchDash);
  drawing.append(line);
  if (swatchMarker) {
    const marker = document.createElementNS(SVG, "text");
    set(marker, { x: 13, y: 9.6, "font-size": 10, "text-anchor": "middle", fill: colour });
    marker.textContent = swatchMarker;
    drawing.append(marker);
  }
  return drawing;
}
