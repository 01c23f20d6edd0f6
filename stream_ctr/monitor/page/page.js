// The live page: it asks for `reports` again and again, and shows what figures.js makes of them.

import * as charts from "./charts.js";
import * as figures from "./figures.js";

const { element, fill } = charts;
const POLL_MS = 2000;
const ANSWER_MS = 10000; // no answer within this is none
const THEME_KEY = "stream-ctr-theme";
const THEMES = ["auto", "light", "dark"];
const at = (id) => document.getElementById(id);

// What the page knows and what a person has chosen; everything else follows from these.
const page = {
  known: figures.understood(null),
  body: null, // of the last answer, to draw only what changed
  tag: null, // ETag of the last answer
  answeredAt: null,
  clockAhead: 0, // milliseconds that the run's clock is ahead of this machine's
  problem: null,
  hidden: new Set(["constant", "best possible"].map((name) => `reference ${name}`)),
  points: "windows",
  pair: null,
  xaxis: "event",
};
const serverNow = () => Date.now() + page.clockAhead;

// -- asking --------------------------------------------------------------------------------------

let timer = null;

async function ask() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const headers = page.tag ? { "If-None-Match": page.tag } : {};
    const answer = await fetch("reports", {
      headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS),
    });
    await take(answer);
    page.problem = null;
  } catch (error) {
    page.problem = error instanceof Unwelcome ? error.message : "The run does not answer.";
    if (error.cause) console.error(error.cause);
  }
  showContact();
  clearTimeout(timer);
  timer = setTimeout(ask, POLL_MS);
}

class Unwelcome extends Error {}

async function take(answer) {
  if (answer.status === 401 || answer.status === 403) {
    throw new Unwelcome("The server asks for its token again: load the page anew.");
  }
  if (!answer.ok && answer.status !== 304) {
    throw new Unwelcome(`The server answers with status ${answer.status}.`);
  }
  const body = answer.status === 304 ? page.body : await answer.text();
  let known = null;
  if (body !== page.body) {
    try {
      known = figures.understood(JSON.parse(body));
    } catch {
      throw new Unwelcome("The server's answer is not JSON.");
    }
  }
  const served = Date.parse(answer.headers.get("date") ?? "");
  page.clockAhead = Number.isNaN(served) || Math.abs(served - Date.now()) < 2000
    ? 0
    : served - Date.now();
  page.answeredAt = Date.now();
  if (known !== null) {
    page.known = known;
    try {
      draw();
    } catch (error) {
      throw new Unwelcome(`This page cannot draw the answer (${error}).`, { cause: error });
    }
    page.tag = answer.headers.get("etag");
    page.body = body; // of an answer that was drawn: another one is drawn again
  }
}

/** Show when the run last answered, and how old its data is. */
function showContact() {
  const contact = at("contact");
  const written = figures.moment(page.known.now?.time);
  const age = written === null ? null : Math.max(0, (serverNow() - written) / 1000);
  const isFailing = page.problem !== null;
  const overdue = isFailing || page.answeredAt === null
    ? null
    : figures.overdueWords(page.known, serverNow());
  document.body.classList.toggle("stale", isFailing);
  at("no-answer").hidden = !isFailing && overdue === null;
  if (overdue !== null) setText(at("no-answer"), overdue);
  const words = document.hidden
    ? "paused"
    : isFailing
      ? "no answer"
      : page.answeredAt === null
        ? "connecting"
        : page.known.isEnded
          ? "the run has ended"
          : "live";
  contact.dataset.contact = isFailing ? "failing" : page.known.isEnded ? "ended" : "live";
  setText(contact, words + (age === null ? "" : ` · report ${figures.duration(Math.round(age))} old`));
  if (isFailing) {
    const since = page.answeredAt === null
      ? "It has not answered since this page was opened."
      : `It last answered ${figures.duration(Math.round((Date.now() - page.answeredAt) / 1000))} ago; ` +
        `the figures below are ${age === null ? "old" : `${figures.duration(Math.round(age))} old`}.`;
    setText(at("no-answer"), `${page.problem} ${since}`);
  }
}

function setText(node, words) {
  if (node.textContent !== words) node.textContent = words;
}

// -- drawing -------------------------------------------------------------------------------------

function draw() {
  const { known } = page;
  const name = known.model ?? "stream_ctr";
  const state = figures.state(known);
  const alarms = figures.alarms(known);
  const mark = alarms.length ? `▲${alarms.length} ` : "";
  document.title = `${mark}${state.label} · ${name} · stream_ctr`;
  setText(at("run"), known.run ? `run ${known.run.slice(0, 8)} · publishes ${name}` : "");
  at("run").title = known.run ? `run ${known.run}` : "";
  at("state").dataset.state = state.name;
  setText(at("state-name"), state.label);
  setText(at("state-words"), state.words);
  drawAlarms(alarms);
  drawTiles();
  drawModels();
  drawLegend();
  drawCharts();
  drawTables();
  drawCounters();
  document.body.dataset.drawn = known.now?.time ?? "";
}

function drawAlarms(alarms) {
  at("alarms").hidden = !alarms.length;
  at("alarm-list").replaceChildren(
    ...alarms.map(({ name, since, text }) => {
      const item = element("li", { "data-alarm": name });
      item.append(element("strong", {}, name.replaceAll("_", " ")), " ", element("span", {}, text));
      if (since !== null) {
        const age = figures.duration(Math.max(0, Math.round((serverNow() - since) / 1000)));
        const when = `since ${figures.clock(since)}${page.known.isEnded ? "" : `, ${age}`}`;
        item.append(" ", element("time", { datetime: new Date(since).toISOString() }, when));
      }
      return item;
    }),
  );
}

function drawTiles() {
  at("tiles").replaceChildren(
    ...figures.tiles(page.known, serverNow()).map((tile) => {
      const made = element("div", {
        class: `tile${tile.isWide ? " wide" : ""}${tile.isBad ? " bad" : ""}`,
        "data-figure": tile.key,
      });
      const value = element("dd", { class: "value" }, tile.value);
      made.append(element("dt", {}, tile.title), value, element("dd", { class: "sub" }, tile.about));
      return made;
    }),
  );
}

const looks = (isDark) => {
  const places = new Map(figures.modelNames(page.known).map((name, place) => [name, place]));
  return (name) => charts.look(places.get(name) ?? 0, isDark);
};

function drawModels() {
  const rows = figures.modelRows(page.known);
  at("models").hidden = !rows.length;
  if (!rows.length) return;
  const { words, figures: scope } = figures.scope(page.known);
  setText(at("models-about"), words);
  const lookOf = looks(charts.theme().isDark);
  const isServed = rows.some((row) => row.served.count > 0);
  const [logloss, auc, ratio] = [figures.fixed(5), figures.fixed(4), figures.fixed(3)];
  const interval = ({ low, high }) => figures.number(low) === null
    ? figures.DASH
    : `${figures.difference(low)} to ${figures.difference(high)}`;
  const heads = ["model", "logloss", "AUC", "pred/actual", "NE", "impressions",
    `${rows[0].name} minus it`, "95 % interval", "logloss, run", ...(isServed ? ["as served, run"] : [])];
  const cells = rows.map(({ name, score, pair, served, run }, place) => {
    const label = element("span", { class: "model" });
    label.append(charts.swatch(lookOf(name)), element("span", {}, name));
    return [label, logloss(score.logloss), auc(score.auc), ratio(score.pred_over_actual),
      auc(score.ne), figures.count(score.count),
      place ? figures.difference(pair.logloss_difference) : "", place ? interval(pair) : "",
      logloss(run.logloss), ...(isServed ? [logloss(served.logloss)] : [])];
  });
  const now = page.known.now ?? {};
  const served = figures.object(now.as_served);
  for (const name of figures.references(page.known)) {
    const key = figures.REFERENCES[name];
    cells.push([name, logloss(scope[key]), "", "", "", "", "", "", logloss(now[key]),
      ...(isServed ? [logloss(served[key])] : [])]);
  }
  fill(at("models-table"), heads, cells, {
    rowClasses: [...rows.map((_, place) => (place ? "" : "first")), "reference", "reference"],
  });
  [...at("models-table").tBodies[0].rows].forEach((row, place) => {
    if (rows[place]) row.dataset.model = rows[place].name;
  });
}

/** Buttons that show and hide the lines of a model in all charts; kept, so that focus stays. */
function drawLegend() {
  const names = figures.modelNames(page.known);
  const references = figures.references(page.known);
  at("legend-bar").hidden = !names.length;
  const { isDark, muted } = charts.theme();
  const lookOf = looks(isDark);
  const wanted = [
    ...names.map((name) => [name, name, lookOf(name)]),
    ...references.map((name) => [
      `reference ${name}`, name, { colour: muted, ...charts.REFERENCE_LOOKS[name] },
    ]),
  ];
  const key = JSON.stringify([isDark, wanted.map(([id]) => id)]);
  const legend = at("legend");
  if (legend.dataset.key === key) return;
  const focused = [...legend.children].findIndex((button) => button === document.activeElement);
  legend.dataset.key = key;
  legend.replaceChildren(...wanted.map(([id, name, style]) => legendButton(id, name, style)));
  if (focused >= 0) legend.children[Math.min(focused, legend.children.length - 1)]?.focus();
}

function legendButton(id, name, style) {
  const button = element("button", {
    type: "button", "aria-pressed": String(!page.hidden.has(id)), "data-series": id,
  });
  button.append(charts.swatch(style), element("span", {}, name));
  button.addEventListener("click", () => {
    if (page.hidden.has(id)) page.hidden.delete(id);
    else page.hidden.add(id);
    button.setAttribute("aria-pressed", String(!page.hidden.has(id)));
    drawCharts();
  });
  return button;
}

// -- charts --------------------------------------------------------------------------------------

const METRICS = [
  { id: "logloss", title: "Logloss", unit: "nats per impression", metric: "logloss",
    digits: 5, hasReferences: true },
  { id: "auc", title: "AUC", unit: "AUC", metric: "auc", digits: 4 },
  { id: "calibration", title: "Calibration", unit: "predicted / actual clicks",
    metric: "pred_over_actual", digits: 3, level: 1 },
];
const FLOWS = [
  { id: "throughput", title: "Throughput", unit: "events/s", about: "between two reports",
    form: figures.count, of: (report, before) => figures.rate(report, before) },
  { id: "lag", title: "Lag", unit: "records unread", about: "of the input, at each report",
    form: figures.count, of: (report) => figures.number(report.lag) },
  { id: "pending", title: "Pending", unit: "impressions", about: "wait for their clicks",
    form: figures.count, of: (report) => figures.number(report.pending) },
  { id: "freshness", title: "Freshness", unit: "seconds", isDuration: true,
    about: "from event time to published; of a replay, event time behind the learner",
    form: figures.duration, of: (report) => figures.freshness(report).seconds },
];
const SERVED = "the run up to each report, on a share of the impressions";
const BEYOND = "; early values are beyond the axis";
const NO_WINDOW = "No window of event time has been scored yet.";

const all = {};

function makeCharts() {
  const grid = at("chart-grid");
  for (const each of METRICS) {
    all[each.id] = new charts.Chart(grid, { ...each, about: "", empty: NO_WINDOW });
  }
  all.difference = new charts.Chart(grid, {
    id: "difference", title: "Paired difference", unit: "nats per impression",
    about: "", empty: "No two models have been scored on the same impressions yet.",
  });
  all.served = new charts.Chart(grid, {
    id: "served", title: "Logloss as served", unit: "nats per impression",
    about: SERVED,
    empty: "No impression has been scored as served yet.",
  });
  for (const each of FLOWS) {
    all[each.id] = new charts.Chart(grid, {
      ...each, empty: each.id === "freshness"
        ? "The reports do not say yet what is published." : "No report has an event time yet.",
    });
  }
  all.curve = new charts.Chart(grid, {
    id: "curve", title: "Window curve", unit: "% of the clicks lost",
    about: "the share of the clicks that other label windows would lose",
    empty: "The window curve comes with the last report of a run.",
  });
  const choice = element("label", { class: "pair" }, "against ");
  all.difference.select = element("select", { id: "pair" });
  choice.append(all.difference.select);
  all.difference.tools.prepend(choice);
  all.difference.select.addEventListener("change", () => {
    page.pair = all.difference.select.value;
    drawCharts();
  });
  for (const { id } of FLOWS) addClockChoice(all[id]);
}

function addClockChoice(chart) {
  const button = element("button",
    { type: "button", class: "quiet clock", "aria-pressed": "false" }, "By clock");
  button.title = "Show the machine's clock in place of event time";
  button.addEventListener("click", () => {
    page.xaxis = page.xaxis === "event" ? "clock" : "event";
    drawCharts();
  });
  chart.tools.prepend(button);
}

function drawCharts() {
  const known = page.known;
  const points = page.points === "windows" ? figures.windowPoints(known) : figures.rollingPoints(known);
  const about = pointWords(points);
  for (const each of METRICS) drawMetric(each, points, about);
  drawDifference(points);
  drawServed();
  for (const each of FLOWS) drawFlow(each);
  drawCurve();
}

function pointWords(points) {
  const latest = points[points.length - 1];
  if (!latest) return "";
  const hollow = latest.provisional ? "; hollow: provisional" : "";
  if (page.points === "rolling") return `rolling window at each report${hollow}`;
  const final = points.filter((point) => !point.provisional);
  const { from, time } = final[final.length - 1] ?? latest;
  const length = (figures.moment(time) - figures.moment(from)) / 1000;
  return `final windows of ${figures.duration(length)}${hollow}`;
}

function drawMetric({ id, metric, digits, level, hasReferences }, points, about) {
  const { isDark, muted, card } = charts.theme();
  const lookOf = looks(isDark);
  const names = figures.modelNames(page.known).filter((name) => !page.hidden.has(name));
  const form = figures.fixed(digits);
  const lines = names.map((name) => ({
    name, series: figures.modelSeries(points, name, metric), style: lookOf(name),
  }));
  for (const name of hasReferences ? figures.references(page.known) : []) {
    if (page.hidden.has(`reference ${name}`)) continue;
    const style = { colour: muted, ...charts.REFERENCE_LOOKS[name] };
    lines.push({ name, series: figures.referenceSeries(points, name), style });
  }
  const hover = (name) => `${escaped(name)} %{y:.${digits}f}<extra></extra>`;
  const range = charts.focusedRange(lines, level);
  setText(all[id].about, about + (range ? BEYOND : ""));
  all[id].update({
    traces: lines.flatMap(({ name, series, style }) =>
      charts.lineTraces(series, { name: escaped(name), ...style, card, hover: hover(name) })),
    layout: {
      shapes: level === undefined ? [] : [levelLine(level, muted)], yaxis: range ? { range } : {},
    },
    table: lineTable(points, lines, form),
    summary: summaryWords(lines, form),
  });
}

const levelLine = (level, colour) => ({
  type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level, layer: "below",
  line: { color: colour, width: 1.2, dash: "4px,3px" },
});

function lineTable(points, lines, form) {
  return {
    heads: [page.points === "windows" ? "window ends" : "event time", ...lines.map(({ name }) => name), ""],
    rows: points.map((point, place) => [
      figures.clock(point.time), ...lines.map(({ series }) => form(series[place].value)),
      point.provisional ? "provisional" : "",
    ]),
  };
}

function summaryWords(lines, form) {
  const words = lines.map(({ name, series }) => {
    const known = series.filter((point) => point.value !== null);
    return known.length ? `${name} ${form(known[known.length - 1].value)}` : null;
  });
  return `Newest values: ${words.filter(Boolean).join(", ") || "none"}.`;
}

/** Plotly reads a few tags in its texts, so a name from outside must hold none. */
const escaped = (name) =>
  name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")
    .replaceAll("%{", "% {");

function drawDifference(points) {
  const names = figures.modelNames(page.known);
  const chart = all.difference;
  const others = names.slice(1);
  const paired = figures.list(figures.object(page.known.now?.paired).models);
  if (!others.includes(page.pair)) {
    page.pair = others.includes(paired[1]) ? paired[1] : (others[others.length - 1] ?? null);
  }
  syncOptions(chart.select, others, page.pair);
  const { isDark, ink, muted, card, band } = charts.theme();
  const series = page.pair === null ? [] : figures.pairSeries(points, page.pair);
  const name = page.pair === null ? "" : `${names[0]} minus ${page.pair}`;
  const colour = charts.look(0, isDark).colour;
  const range = charts.focusedRange([{ series }], 0);
  setText(chart.about, name && `${name}, 95 % band; below 0 ${names[0]} is better` +
    (range ? BEYOND : ""));
  chart.update({
    traces: [
      ...charts.bandTraces(series.filter((point) => !point.provisional), band),
      ...provisionalInterval(series, colour),
      ...charts.lineTraces(series, {
        name: escaped(name), colour, dash: "solid", marker: "circle", width: 2.2, card,
        hover: "%{y:+.5f}<extra></extra>",
      }),
    ],
    layout: { shapes: [{ ...levelLine(0, ink), line: { color: muted, width: 1.4 } }],
      yaxis: { rangemode: "tozero", tickformat: ".5~f", ...(range ? { range } : {}) } },
    table: {
      heads: [page.points === "windows" ? "window ends" : "event time", name, "low", "high", ""],
      rows: series.map((point) => [figures.clock(point.time), figures.difference(point.value),
        figures.difference(point.low), figures.difference(point.high),
        point.provisional ? "provisional" : ""]),
    },
    summary: summaryWords([{ name, series }], figures.difference),
  });
}

function provisionalInterval(series, colour) {
  const tail = series.filter((point) => point.provisional && point.low !== null);
  return tail.map((point) => ({
    type: "scatter", mode: "lines", x: [point.time, point.time], y: [point.low, point.high],
    line: { color: colour, width: 1.4 }, hoverinfo: "skip", showlegend: false, name: "interval",
  }));
}

function syncOptions(select, names, chosen) {
  const have = [...select.options].map((option) => option.value);
  if (have.join("\n") !== names.join("\n")) {
    select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  }
  if (chosen !== null && select.value !== chosen) select.value = chosen;
  select.disabled = names.length < 2;
}

function drawServed() {
  const { isDark, muted, card } = charts.theme();
  const lookOf = looks(isDark);
  const published = figures.modelNames(page.known)[0];
  const served = figures.servedNames(page.known).filter((name) => !page.hidden.has(name));
  const lines = served.map((name) => ({
    name: `${name} as served`, series: figures.servedSeries(page.known, name), style: lookOf(name),
  }));
  const progressive = figures.servedSeries(page.known, figures.PROGRESSIVE);
  if (progressive.length) {
    const style = { colour: muted, dash: "dot", width: 2 };
    lines.push({ name: `${published} progressive`, series: progressive, style });
  }
  const form = figures.fixed(5);
  const range = charts.focusedRange(lines);
  setText(all.served.about, SERVED + (range ? BEYOND : ""));
  const moments = [...new Set(lines.flatMap(({ series }) => series.map((point) => point.time)))].sort();
  const byTime = lines.map(({ series }) => new Map(series.map((point) => [point.time, point.value])));
  all.served.update({
    traces: lines.flatMap(({ name, series, style }) =>
      charts.lineTraces(series, { ...style, name: escaped(name), card,
        hover: `${escaped(name)} %{y:.5f}<extra></extra>` })),
    layout: { yaxis: range ? { range } : {} },
    table: {
      heads: ["event time", ...lines.map(({ name }) => name)],
      rows: moments.map((time) =>
        [figures.clock(time), ...byTime.map((values) => form(values.get(time) ?? null))]),
    },
    summary: summaryWords(lines, form),
  });
}

const TIME_UNITS = [["days", 86400], ["hours", 3600], ["minutes", 60], ["seconds", 1]];

function drawFlow({ id, of, form, unit, isDuration }) {
  const { isDark, card } = charts.theme();
  const isClock = page.xaxis === "clock";
  const series = figures.reportSeries(page.known, of)
    .map((point) => ({ ...point, time: isClock ? point.clock : point.time }))
    .filter((point) => figures.moment(point.time) !== null);
  const most = Math.max(0, ...series.map((point) => point.value ?? 0));
  const [scaled, size] = isDuration
    ? (TIME_UNITS.find(([, length]) => most >= 2 * length) ?? TIME_UNITS[3])
    : [unit, 1];
  const drawn = series.map((point) =>
    ({ ...point, value: point.value === null ? null : point.value / size }));
  all[id].unit = scaled;
  const button = all[id].tools.querySelector(".clock");
  button.setAttribute("aria-pressed", String(isClock));
  all[id].update({
    traces: charts.lineTraces(drawn, {
      name: unit, ...charts.look(0, isDark), marker: null, width: 1.8, card,
      hover: `%{y:,.${isDuration ? 1 : 0}f} ${scaled}<extra></extra>`,
    }),
    layout: { yaxis: { rangemode: "tozero" },
      xaxis: { title: isClock ? "machine's clock (UTC)" : "event time (UTC)" } },
    table: {
      heads: [isClock ? "clock" : "event time", unit],
      rows: series.map((point) => [figures.clock(point.time), form(point.value)]),
    },
    summary: summaryWords([{ name: unit, series }], form),
  });
}

function drawCurve() {
  const { isDark, card } = charts.theme();
  const curve = figures.windowCurve(page.known);
  const series = curve.map(({ seconds, lost }) => ({ time: seconds, value: 100 * lost }));
  all.curve.update({
    traces: charts.lineTraces(series, {
      name: "lost", ...charts.look(0, isDark), card, hover: "%{y:.2f} % lost<extra></extra>",
    }),
    layout: {
      yaxis: { rangemode: "tozero" },
      xaxis: {
        type: "log", title: "label window", tickvals: curve.map(({ seconds }) => seconds),
        ticktext: curve.map(({ seconds }) => figures.duration(seconds)), tickangle: -45,
      },
    },
    table: {
      heads: ["label window", "clicks lost"],
      rows: curve.map(({ seconds, lost }) => [figures.duration(seconds), figures.share(lost)])
        .reverse(), // a table shows its last row first
    },
    summary: curve.map(({ seconds, lost }) => `${figures.duration(seconds)} ${figures.share(lost)}`)
      .join(", "),
  });
}

// -- tables --------------------------------------------------------------------------------------

function tableCard(id, title, about, heads, rows, options) {
  const card = element("section", { class: "card", id, "aria-labelledby": `${id}-title` });
  const head = element("header");
  head.append(element("h2", { id: `${id}-title` }, title), element("p", { class: "about" }, about));
  const scroll = element("div", { class: "scroll", tabindex: "0", role: "region",
    "aria-labelledby": `${id}-title` });
  const table = element("table");
  fill(table, heads, rows, options);
  scroll.append(table);
  card.append(head, scroll);
  return card;
}

function drawTables() {
  const { known } = page;
  const cards = [snapshotCard(known), deadLetterCard(known), clicksCard(known), fieldCard(known)];
  at("tables").replaceChildren(...cards.filter(Boolean));
}

function snapshotCard(known) {
  if (!known.snapshots.length) return null;
  const rows = [...known.snapshots].reverse().map((snapshot) => [
    String(snapshot.name ?? figures.DASH),
    `${VERDICT_SIGNS[snapshot.verdict] ?? ""} ${snapshot.verdict ?? figures.DASH}`.trim(),
    snapshot.loaded === true ? "◀ subscribers load it" : "",
    figures.count(snapshot.examples), figures.clock(snapshot.event_time),
    figures.clock(snapshot.written), figures.list(snapshot.reasons).map(String).join("; "),
  ]);
  const heads = ["snapshot", "verdict", "", "examples", "event time", "written", "reasons"];
  return tableCard("snapshots", "Snapshots", "the newest first", heads, rows, {
    numbersFrom: 99,
    rowClasses: known.snapshots.map((snapshot) =>
      [snapshot.loaded ? "loaded" : "", snapshot.verdict === "refused" ? "refused" : ""]
        .join(" ").trim()).reverse(),
  });
}

const VERDICT_SIGNS = { published: "●", refused: "▲", kept: "○" };

function deadLetterCard(known) {
  const letters = figures.deadLetters(known);
  const rejected = figures.object(known.now?.counters).rejected;
  if (!letters.length) return null;
  const rows = letters.map(([reason, letter]) => [
    reason, figures.count(letter), figures.share(rejected ? letter / rejected : null, 1),
  ]);
  return tableCard("dead-letters", "Dead letters", "malformed records by reason",
    ["reason", "records", "share"], rows);
}

function clicksCard(known) {
  const now = known.now;
  if (now === null) return null;
  const counters = figures.object(now.counters);
  const rows = [
    ["clicks", figures.count(counters.clicks)],
    ["joined", figures.count(counters.clicks_joined)],
    ["too late", figures.count(now.clicks_late)],
    ["without an impression", figures.count(counters.clicks_unmatched)],
    ["coverage", figures.share(now.click_coverage)],
  ];
  const about = "coverage: joined, of the clicks whose outcome is known";
  return tableCard("clicks", "Clicks", about, ["outcome", "clicks"], rows);
}

// Known figures of a field: [key, head, form]. Others that are numbers follow by their own names.
const FIELD_FIGURES = [
  ["missing_rate", "missing", (value) => figures.share(value)],
  ["unseen_rate", "unseen ids", (value) => figures.share(value)],
  ["distinct", "distinct", figures.count],
  ["occupancy", "buckets used", (value) => figures.share(value)],
  ["collision_rate", "collisions", (value) => figures.share(value)],
  ["psi", "PSI", figures.fixed(3)],
];

function fieldCard(known) {
  const fields = figures.object(known.now?.fields);
  const names = Object.keys(fields);
  if (!names.length) return null;
  const keys = new Set(names.flatMap((name) => Object.keys(figures.object(fields[name]))));
  const named = new Set(FIELD_FIGURES.map(([key]) => key));
  const others = [...keys]
    .filter((key) => !named.has(key))
    .filter((key) => names.some((name) => figures.number(fields[name]?.[key]) !== null))
    .map((key) => [key, key.replaceAll("_", " "), figures.fixed(3)]);
  const columns = [...FIELD_FIGURES.filter(([key]) => keys.has(key)), ...others];
  const rows = names.map((name) => [
    name, ...columns.map(([key, , form]) => form(figures.number(figures.object(fields[name])[key]))),
  ]);
  const table = figures.object(known.now?.table);
  const about = figures.number(table.rows) === null
    ? "health of the features"
    : `health of the features; table of ${figures.count(table.rows)} rows, ` +
      `${figures.share(table.occupancy)} learned, ${figures.share(table.collision_rate)} collisions`;
  return tableCard("fields", "Fields", about,
    ["field", ...columns.map(([, head]) => head)], rows);
}

function drawCounters() {
  const counters = figures.object(page.known.now?.counters);
  const names = Object.keys(counters);
  at("counters").hidden = !names.length;
  const rows = names.map((name) => [name, figures.count(counters[name])]);
  fill(at("counters-table"), ["counter", "count"], rows);
}

// -- choices of the person -----------------------------------------------------------------------

function kept(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // storage is turned off
  }
}

function setTheme(name) {
  const theme = THEMES.includes(name) ? name : "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText(at("theme"), `Theme: ${theme}`);
  try {
    localStorage.setItem(THEME_KEY, theme);
  } catch {
    // The choice holds until the page is closed.
  }
  if (page.body !== null) draw();
}

function nextTheme() {
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
}

function choosePoints(points) {
  page.points = points;
  at("by-window").setAttribute("aria-pressed", String(points === "windows"));
  at("by-rolling").setAttribute("aria-pressed", String(points === "rolling"));
  drawCharts();
}

makeCharts();
setTheme(kept(THEME_KEY) ?? "auto");
at("theme").addEventListener("click", nextTheme);
at("by-window").addEventListener("click", () => choosePoints("windows"));
at("by-rolling").addEventListener("click", () => choosePoints("rolling"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (page.body !== null) draw();
});
document.addEventListener("visibilitychange", () => (document.hidden ? showContact() : ask()));
setInterval(showContact, 1000);
drawCharts();
ask();
