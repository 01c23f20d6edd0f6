// From the answer of `reports` to the figures of the page. Pure: no document, no clock, no network.
//
// Readers cope with what is missing: an absent or odd value is null, and null is shown as a dash.

export const DASH = "–";
const MINUS = "−";
const NO_BREAK = "\u00a0";
const RATE_SECONDS = 10; // the least that a rate of now is taken over
const SILENT_SECONDS = 5; // without an answer from any broker, before it is an alarm
const REPLAY_SECONDS = 86400; // event time this far behind the clock: "now" is no measure of age

// -- reading values that may be absent -----------------------------------------------------------

export const number = (value) =>
  typeof value === "number" && Number.isFinite(value) ? value : null;
export const object = (value) =>
  value !== null && typeof value === "object" && !Array.isArray(value) ? value : {};
export const list = (value) => (Array.isArray(value) ? value : []);
export const text = (value) => (typeof value === "string" && value ? value : null);
export const moment = (value) => {
  const milliseconds = typeof value === "string" ? Date.parse(value) : NaN;
  return Number.isNaN(milliseconds) ? null : milliseconds;
};
const last = (values) => (values.length ? values[values.length - 1] : null);

// -- formats -------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const count = (value) => (number(value) === null ? DASH : signed(whole.format(value)));
export const fixed = (digits) => (value) =>
  number(value) === null ? DASH : signed(value.toFixed(digits));
export const difference = (value) =>
  number(value) === null ? DASH : signed((value > 0 ? "+" : "") + value.toFixed(5));
export const share = (value, digits = 2) =>
  number(value) === null ? DASH : `${signed((100 * value).toFixed(digits))} %`;
const signed = (words) => words.replace("-", MINUS);

export function bytes(value) {
  if (number(value) === null) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${unit === 0 ? whole.format(value) : value.toFixed(1)}${NO_BREAK}${units[unit]}`;
}

export function duration(seconds) {
  if (number(seconds) === null) return DASH;
  if (seconds < 0) return signed(`-${duration(-seconds)}`);
  let rest = Math.round(seconds);
  if (rest < 60) return seconds < 10 && rest !== seconds ? `${seconds.toFixed(1)} s` : `${rest} s`;
  const parts = [];
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]]) {
    const units = Math.floor(rest / size);
    rest -= units * size;
    if (units || parts.length) parts.push([units, unit]);
  }
  return parts.slice(0, 2).filter(([units]) => units).map((part) => part.join(" ")).join(" ");
}

/** A moment in UTC, to the second; the day is left out if `beside` is of the same day. */
export function clock(value, beside) {
  const milliseconds = typeof value === "number" ? number(value) : moment(value);
  if (milliseconds === null || Math.abs(milliseconds) > 8.64e15) return DASH;
  const words = new Date(milliseconds).toISOString();
  const day = words.slice(0, words.indexOf("T"));
  const other = moment(beside);
  const isSameDay = other !== null && new Date(other).toISOString().startsWith(day);
  const time = words.slice(words.indexOf("T") + 1, -5);
  return isSameDay ? time : `${day} ${time}`;
}

// -- the answer ----------------------------------------------------------------------------------

/** The answer with every list a list, and the newest report as `now`. */
export function understood(answer) {
  const known = object(answer);
  const reports = list(known.reports).map(object);
  const windows = list(known.windows)
    .map(object)
    .filter((window) => moment(window.end) !== null);
  const now = last(reports);
  return {
    run: text(known.run),
    model: text(known.model),
    isEnded: known.ended === true || (now !== null && ["final", "stopped"].includes(now.kind)),
    reports,
    windows,
    snapshots: list(known.snapshots).map(object),
    now,
  };
}

/** Names of models, the published one first, in the order of the newest report. */
export function modelNames(known) {
  const scopes = [object(known.now?.models), object(last(known.windows)?.models)];
  const names = [...new Set(scopes.flatMap((scope) => Object.keys(scope)))];
  return names.includes(known.model)
    ? [known.model, ...names.filter((name) => name !== known.model)]
    : names;
}

const STATES = {
  learning: "learning",
  waiting: "waiting",
  stalled: "stalled",
  silent: "no broker",
  ended: "ended",
  stopped: "stopped",
  starting: "starting",
};

/** The state as {name, label, words}. Where an alarm says why, the words are those of progress. */
export function state(known) {
  const [name, words] = stateWords(known);
  const isSaid = alarms(known).some((alarm) => alarm.name === name);
  return { name, label: STATES[name], words: isSaid ? progress(known.now) : words };
}

const progress = (now) =>
  `${count(now.examples)} examples learned, event time ${clock(now.event_time)}.`;

function stateWords(known) {
  const { now } = known;
  if (now === null) {
    return known.isEnded
      ? ["ended", "The run left no report."]
      : ["starting", "No report yet: the first comes after schedule.report_every."];
  }
  const examples = `${count(now.examples)} examples`;
  if (now.kind === "stopped") {
    return ["stopped", `The run was stopped after ${examples}. The same command resumes it.`];
  }
  if (known.isEnded) {
    return now.kind === "final"
      ? ["ended", `The run read all of its input and learned ${examples}.`]
      : ["ended", `No process holds the state directory; ${examples} were learned.`];
  }
  if (number(now.silent_seconds) >= SILENT_SECONDS) {
    return ["silent", `No broker has answered for ${duration(now.silent_seconds)}.`];
  }
  if (list(now.stalled).length) {
    return ["stalled", `Learning waits: the clicks of ${list(now.stalled).join(", ")} are overdue.`];
  }
  if (Object.keys(object(now.waiting)).length) return ["waiting", waitingWords(now)];
  return ["learning", progress(now)];
}

function waitingWords(now) {
  const waiting = object(now.waiting);
  if (number(waiting.ready)) {
    return `No example yet: ${count(waiting.ready)} wait for a full batch (learn.batch_size).`;
  }
  if (moment(waiting.until) === null) return "No example yet: waiting for the first impression.";
  const words =
    `No example yet: ${pendingWords(now)}. The first are learned when event time is ` +
    clock(waiting.until);
  const held = list(waiting.held_by).map(String);
  if (held.length) {
    const more = held.length > 3 ? ` and ${held.length - 3} others` : "";
    return `${words} in every partition; no event yet from ${held.slice(0, 3).join(", ")}${more}.`;
  }
  if (moment(waiting.reached) === null) return `${words}.`;
  const left = (moment(waiting.until) - moment(waiting.reached)) / 1000;
  return `${words}; it is ${clock(waiting.reached, waiting.until)}, ${duration(left)} to go.`;
}

function pendingWords(now) {
  const labelled = number(object(now.waiting).labelled) || 0;
  const impressions = number(now.pending) - labelled;
  const examples = `${count(labelled)} labelled examples`;
  if (labelled && !impressions) return `${examples} wait for those before them`;
  const words = `${count(impressions)} impressions wait for their clicks`;
  return labelled ? `${words}, ${examples} for those before them` : words;
}

// -- alarms --------------------------------------------------------------------------------------

// What a report says by itself: [name, does it hold in this report?, words].
const CONDITIONS = [
  ["silent", (now) => number(now.silent_seconds) >= SILENT_SECONDS,
    (now) => `No broker has answered for ${duration(now.silent_seconds)}.`],
  ["stalled", (now) => list(now.stalled).length > 0,
    (now) => `The clicks of ${list(now.stalled).join(", ")} are overdue; learning waits.`],
  // Before the first example a refusal only says that nothing was learned.
  ["refused", (now) => list(now.refused).length > 0 && number(now.examples) > 0,
    (now) => `Snapshots are not published: ${list(now.refused).join("; ")}.`],
  ["left_out", (now) => Object.keys(object(now.left_out)).length > 0,
    (now) => `${Object.keys(object(now.left_out)).join(", ")} diverged and no longer learns.`],
];

/** All alarms that hold as {name, since, text}: those of the newest report, and its conditions. */
export function alarms(known) {
  const { now } = known;
  if (now === null) return [];
  const named = list(now.alarms)
    .map(object)
    .map((alarm) => ({
      name: text(alarm.name) ?? "alarm",
      since: moment(alarm.since),
      text: text(alarm.text) ?? "",
    }));
  const have = new Set(named.map((alarm) => alarm.name));
  const derived = CONDITIONS.filter(([name, holds]) => !have.has(name) && holds(now)).map(
    ([name, holds, words]) => ({ name, since: heldSince(known.reports, holds), text: words(now) }),
  );
  return [...named, ...derived];
}

/** The time of the first report of the unbroken row, up to now, in which it holds. */
function heldSince(reports, holds) {
  let first = reports.length - 1;
  while (first > 0 && holds(reports[first - 1])) first -= 1;
  return moment(reports[first].time);
}

/** What is wrong when a run that answers writes no reports any more; null if they come. */
export function overdueWords(known, serverNow) {
  const times = known.reports.map((report) => moment(report.time)).filter((time) => time !== null);
  if (known.isEnded || !times.length) return null;
  const gaps = times.slice(1).map((time, place) => time - times[place]).sort((one, two) => one - two);
  const usual = gaps.length ? gaps[Math.floor(gaps.length / 2)] / 1000 : 0;
  const age = (serverNow - last(times)) / 1000;
  if (age < Math.max(60, 5 * usual)) return null;
  const words = usual ? ` One came every ${duration(Math.round(usual))}.` : "";
  return `The run answers, but its newest report is ${duration(Math.round(age))} old.${words}`;
}

// -- key figures ---------------------------------------------------------------------------------

/** Events a second since the report before, or over the run. */
export function rate(report, before) {
  const seconds = number(report?.seconds);
  const earlier = number(before?.seconds);
  const events = number(report?.events) - number(before?.events);
  if (seconds === null || earlier === null || seconds <= earlier) {
    return number(report?.events_per_second);
  }
  return Math.max(0, events) / (seconds - earlier);
}

/**
 * How fresh what is published is: {seconds, words}.
 *
 * On a live stream it is how long recent examples took from the event until they were published,
 * the median in the report. Without it, it is the time from the event of the last example of the
 * published snapshot, of the report or the one that is given, until it was written. A replay's
 * event time says nothing about the clock, so there it is how far, in event time, the learner is
 * ahead.
 */
export function freshness(report, snapshot = null) {
  const published = object(snapshot ?? report?.published);
  const event = moment(published.event_time);
  const reached = moment(report?.event_time);
  if (event === null) return { seconds: null, words: "nothing is published" };
  const age = (moment(report.time) - reached) / 1000;
  if (reached !== null && Math.abs(age) > REPLAY_SECONDS) {
    const words = `event time behind the learner; replay, ${duration(age)} old`;
    return { seconds: (reached - event) / 1000, words };
  }
  const ages = object(object(report.freshness).event_to_published);
  if (number(ages.p50) !== null) {
    const slow = number(ages.p99) === null ? "" : `, 99 % within ${duration(ages.p99)}`;
    return { seconds: ages.p50, words: `from event time to published, median${slow}` };
  }
  const written = moment(published.written);
  const words = "from event time to published";
  return { seconds: written === null ? null : (written - event) / 1000, words };
}

/** The snapshot that subscribers load, of the list or of the newest report; null if none. */
export function published(known) {
  const loaded = known.snapshots.find((snapshot) => snapshot.loaded === true);
  if (loaded) return loaded;
  const named = object(known.now?.published);
  return text(named.snapshot) === null
    ? null
    : { name: named.snapshot, event_time: named.event_time, written: named.written };
}

/** The newest snapshot's verdict in words. */
export function newestVerdict(known) {
  const newest = last(known.snapshots);
  if (newest === null) return null;
  const reasons = list(newest.reasons).map(String);
  const words = { published: "published", refused: "refused", kept: "kept, not published" };
  return {
    name: text(newest.name),
    verdict: text(newest.verdict),
    words: words[newest.verdict] ?? "no verdict",
    reasons,
  };
}

export function deadLetters(known) {
  const counters = object(known.now?.counters);
  return Object.keys(counters)
    .filter((name) => name.startsWith("rejected."))
    .map((name) => [name.slice("rejected.".length), number(counters[name])])
    .sort((one, other) => other[1] - one[1]);
}

/** Events a second over the newest reports that span some seconds; over the run if it has ended. */
export function newestRate(known) {
  const now = known.now ?? {};
  if (known.isEnded) return number(now.events_per_second);
  let before = null;
  for (let place = known.reports.length - 2; place >= 0; place -= 1) {
    const seconds = number(known.reports[place].seconds);
    if (seconds === null || seconds >= number((before ?? now).seconds)) break;
    before = known.reports[place];
    if (now.seconds - seconds >= RATE_SECONDS) break;
  }
  return rate(now, before);
}

/** The tiles at the top: {key, title, value, about, isBad}. */
export function tiles(known, serverNow) {
  const now = known.now ?? {};
  const counters = object(now.counters);
  const fresh = freshness(now, published(known));
  const records = number(counters.records) ?? number(now.events);
  const rejected = number(counters.rejected);
  const failed = number(counters.publications_failed) ?? 0;
  const loaded = published(known);
  const newest = newestVerdict(known);
  return [
    { key: "lag", title: "Lag", value: count(now.lag), about: "records unread" },
    { key: "freshness", title: "Freshness", value: duration(fresh.seconds), about: fresh.words },
    { key: "throughput", title: "Throughput",
      value: count(newestRate(known)),
      about: `events/s${known.isEnded ? " over the run" : ""}; ${count(now.events)} read` },
    { key: "pending", title: "Pending", value: count(now.pending),
      about: number(now.pending_bytes) === null
        ? "impressions wait for clicks"
        : `impressions, ${bytes(now.pending_bytes)}` },
    { key: "dead", title: "Dead letters", value: count(rejected), isBad: rejected > 0,
      about: records ? `${share(rejected / records, 3)} of records` : "malformed records" },
    { key: "coverage", title: "Clicks joined", value: share(now.click_coverage),
      about: `${count(now.clicks_late)} clicks too late` },
    { key: "published", title: "Published snapshot", isWide: true,
      isBad: failed > 0 || newest?.verdict === "refused",
      value: loaded ? String(loaded.name) : "none",
      about: publishedWords(loaded, newest, serverNow, failed) },
  ];
}

function publishedWords(loaded, newest, serverNow, failed) {
  const parts = [];
  const written = moment(loaded?.written);
  if (written !== null && serverNow) {
    parts.push(`${duration(Math.max(0, Math.round((serverNow - written) / 1000)))} ago`);
  }
  if (newest) {
    const isOther = loaded && newest.name !== loaded.name;
    const refused = newest.verdict === "refused" && newest.reasons.length;
    parts.push(
      (isOther ? `newest ${newest.name}: ` : "verdict: ") + newest.words +
        (refused ? ` (${newest.reasons.join("; ")})` : ""),
    );
  }
  if (failed) parts.push(`${count(failed)} publications failed`);
  return parts.join(" · ") || "no snapshot yet";
}

// -- models --------------------------------------------------------------------------------------

/** The scope of the model table: the rolling window, or the run if there is none yet. */
export function scope(known) {
  const now = known.now ?? {};
  const rolling = object(now.rolling);
  if (Object.keys(object(rolling.models)).length) {
    const provisional = rolling.provisional ? ", provisional" : "";
    const bounds = `${clock(rolling.start)} to ${clock(rolling.end, rolling.start)}`;
    return { figures: rolling, words: `rolling window ${bounds}${provisional}` };
  }
  return { figures: now, words: "whole run" };
}

/** Rows of the model table: {name, score, pair, served, run}. */
export function modelRows(known) {
  const { figures } = scope(known);
  const served = object(object(known.now?.as_served).models);
  return modelNames(known).map((name) => ({
    name,
    score: object(object(figures.models)[name]),
    pair: object(object(figures.pairs)[name]),
    served: object(served[name]),
    run: object(object(known.now?.models)[name]),
  }));
}

export const REFERENCES = { "best possible": "best_possible_logloss", constant: "constant_logloss" };

/** Names of the references that the run knows. */
export const references = (known) =>
  Object.keys(REFERENCES).filter((name) =>
    [scope(known).figures, known.now ?? {}, ...known.windows.slice(-1)].some(
      (figures) => number(figures[REFERENCES[name]]) !== null,
    ),
  );

// -- series --------------------------------------------------------------------------------------

/**
 * The points of the charts: {time, from, figures, provisional}. Those of final windows stand at the
 * ends of the windows, and the rolling window that may still change is the last, provisional one.
 */
export function windowPoints(known) {
  const points = known.windows.map((window) => ({
    time: window.end, from: window.start, figures: window, provisional: false,
  }));
  const rolling = object(known.now?.rolling);
  const end = moment(rolling.end);
  if (rolling.provisional && end !== null && !(end <= moment(last(points)?.time))) {
    points.push({ time: rolling.end, from: rolling.start, figures: rolling, provisional: true });
  }
  return points;
}

/** The rolling window of each report, at the event time of the report. */
export function rollingPoints(known) {
  const points = known.reports
    .filter((report) => object(report.rolling).models && moment(report.event_time) !== null)
    .map((report) => ({
      time: report.event_time, from: report.rolling.start, figures: report.rolling,
      provisional: false,
    }));
  if (points.length && !known.isEnded) last(points).provisional = true;
  return points;
}

/** {time, value, provisional} of a metric of one model. */
export const modelSeries = (points, name, metric) =>
  points.map(({ time, from, figures, provisional }) => ({
    time, from, provisional,
    value: number(object(object(figures.models)[name])[metric]),
  }));

export const referenceSeries = (points, name) =>
  points.map(({ time, from, figures, provisional }) => ({
    time, from, provisional, value: number(figures[REFERENCES[name]]),
  }));

/** The published model's logloss minus that of another, with its 95 % interval. */
export const pairSeries = (points, name) =>
  points.map(({ time, from, figures, provisional }) => {
    const pair = object(object(figures.pairs)[name]);
    return {
      time, from, provisional,
      value: number(pair.logloss_difference), low: number(pair.low), high: number(pair.high),
    };
  });

/** A figure of each report; `of` gets the report and the one before. */
export const reportSeries = (known, of) =>
  known.reports
    .map((report, place) => ({
      time: report.event_time, clock: report.time, value: of(report, known.reports[place - 1]),
    }));

/** As served and, on the same impressions, progressive: the run up to each report. */
export const servedSeries = (known, name) =>
  known.reports
    .filter((report) => number(object(object(report.as_served).models)[name]?.count) > 0)
    .map((report) => ({
      time: report.event_time, value: number(report.as_served.models[name].logloss),
    }));

/** {seconds, lost} of the newest report that has a window curve, the last of a run. */
export function windowCurve(known) {
  const curves = known.reports.map((report) => list(report.window_curve)).filter((curve) => curve.length);
  return list(last(curves))
    .map(object)
    .map((point) => ({ seconds: number(point.window_seconds), lost: number(point.lost_share) }))
    .filter(({ seconds, lost }) => seconds > 0 && lost !== null);
}

export const PROGRESSIVE = "progressive";
export const servedNames = (known) =>
  Object.keys(object(object(known.now?.as_served).models)).filter(
    (name) => name !== PROGRESSIVE && number(known.now.as_served.models[name]?.count) > 0,
  );
