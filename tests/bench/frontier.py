"""Logloss against events/s: our models and batch sizes, Vowpal Wabbit, River; docs/results.md.

    python tests/bench/frontier.py                           # all logs and seeds, hours
    python tests/bench/frontier.py --quick                   # small streams, one seed, minutes
    python tests/bench/frontier.py falling-400k --seeds 0    # one log; others in the page stay
    python tests/bench/frontier.py --render                  # page and figure, from the JSON file
    ... --json docs/quality.json --page docs/results.md --figure docs/quality.svg

Logs
  simulated-N  a simulated stream of N impressions (20k, 1m); its best possible logloss is known
  drift-N      the same, with new weights from the middle on (`stream-ctr simulate --drift weights`)
  falling-N    the same, with a click rate that falls to a quarter in the middle (`--drift rate`)
  criteo, avazu, obd
               samples of real logs, in STREAM_CTR_DATA or ../shared/data

Contenders
  Ours         `stream-ctr run --source LOG --until-end` with the defaults, without River, and with
               other batch sizes and models. events/s is that of its final report: decoding, join,
               learning and metrics, FTRL beside it. Its seed is `learn.seed`.
  River        the same with `--model lr` and the baseline, which bounds the speed
  Vowpal Wabbit
               linear, with all pairs of fields (`-q ::`), and with these and `--ftrl`. It gets the
               examples as a run learns them, already decoded, hashed and joined, in its text
               format, so its events/s leaves out what ours includes. Its predictions are
               progressive too, so one run with each rate of a small grid gives both the rate that
               is chosen by the logloss of the first fifth of the log, and the one with the least
               logloss over all of it (`in hindsight`).

Figures
  All are progressive: each example is predicted, then learned. They cover the whole run, its first
  tenth and its last half, to the nearest of at most 128 blocks of examples, which the final
  snapshot holds. A difference from exact FTRL is paired on the same examples; exact FTRL (alpha
  0.1) is part of each of our runs. Vowpal Wabbit's examples are compared with the ledger of the
  run. For a falling rate, `recovery` is the number of examples from the change on until predicted /
  actual clicks, rolled over four blocks, is in 0.9 to 1.1 (see progressive.py). events/s of a log
  of some ten thousand impressions is mostly the time to write snapshots.

Each log and seed is a case of the JSON file. Cases that are not measured stay in it. With --missing
only those are measured that it lacks, so that an interrupted run can continue. --busy is for a
machine with other work: the figures of quality do not depend on it, and the page leaves out
events/s. --reports keeps the final report of each run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from msgspec import structs
from pyarrow import csv

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import fill  # noqa: E402

from bench import frontier_figure, frontier_page, zipf  # noqa: E402
from bench.contest import Program  # noqa: E402
from bench.environments import NotRun, Peer  # noqa: E402
from bench.frontier_page import DEFAULTS, IN_HINDSIGHT, ONE_STEP, batch_name  # noqa: E402
from bench.progressive import (  # noqa: E402
    PARTS,
    Pair,
    difference,
    final_snapshot,
    part_figures,
    predicted,
    recovery,
)
from bench.speed import CACHE, REQUIREMENTS, record, say  # noqa: E402
from stream_ctr import config as configuration  # noqa: E402
from stream_ctr.connectors.memory import BatchSource  # noqa: E402
from stream_ctr.evaluate.metrics import WholeRun, losses  # noqa: E402
from stream_ctr.events.decoder import Decoder  # noqa: E402
from stream_ctr.events.features import Hasher  # noqa: E402
from stream_ctr.join.examples import Examples, Ledger  # noqa: E402
from stream_ctr.join.joiner import LabelJoiner  # noqa: E402
from stream_ctr.join.watermark import Watermarks  # noqa: E402
from stream_ctr.logs.open import open_log  # noqa: E402
from stream_ctr.paper.reading import JoinedLog  # noqa: E402
from stream_ctr.snapshots.manifest import Manifest  # noqa: E402
from stream_ctr.train.ingest import Ingest  # noqa: E402

DATA = Path(os.environ.get("STREAM_CTR_DATA") or ROOT.parent / "shared" / "data")
LOGS = (
    *("simulated-20k", "simulated-100k", "simulated-400k", "simulated-1m"),
    *("drift-20k", "drift-100k", "drift-400k", "falling-400k"),
    *("criteo", "avazu", "obd"),
)
QUICK_LOGS = ("simulated-20k", "drift-20k", "falling-20k", "criteo")
SEEDS = (0, 1, 2)
_WARM_UP_IMPRESSIONS = 1000
BATCH_SIZES = (64, 128, 512, 4096)
_STREAM = re.compile(r"(simulated|drift|falling)-(\d+)([km]?)")
_DRIFTS = {"simulated": "none", "drift": "weights", "falling": "rate"}
_SERVED_SHARE = "metrics.served_share"
_THOUSANDS = {"": 1, "k": 1_000, "m": 1_000_000}
_SAMPLES = {"criteo": "criteo/train.csv", "avazu": "avazu/train.csv", "obd": "obd/impressions.csv"}

FTRL_NAMES = ("ftrl", "lr")
"""Exact FTRL is `ftrl` beside other models, and `lr` where it is a model of its own."""
_SCORES = ("logloss", "auc", "pred_over_actual")
_DIGITS = 6
# What the JSON file does not keep of a report: parts of it are there in another form.
_NOT_KEPT = {
    *("format", "kind", "from_example", "models", "paired", "pairs", "rolling", "notes", "lag"),
    *("last_half", "last_quarter", "window_curve", "profile", "counters", "ledger", "pending"),
    *("event_time", "watermark", "snapshot", "stalled", "stalls", "silent_seconds", "baseline"),
    *("constant_logloss", "best_possible_logloss", "clicks_late", "as_served"),
    "as_served_last_half",
}


@dataclass(frozen=True, slots=True)
class Stream:
    """A log of the benchmark: a simulated stream of `impressions`, or a sample in `path`."""

    name: str
    impressions: int = 0
    drift: str = "none"
    path: Path | None = None

    @classmethod
    def named(cls, name: str) -> Stream:
        """Return the log with this name. Raises `ValueError` when there is none.

        >>> Stream.named("falling-2k")
        Stream(name='falling-2k', impressions=2000, drift='rate', path=None)
        """
        if name in _SAMPLES:
            return cls(name, path=DATA / _SAMPLES[name])
        found = _STREAM.fullmatch(name)
        if not found or not int(found[2]):
            raise ValueError(
                f"no log {name!r}: there are {', '.join(_SAMPLES)}, and simulated-N, drift-N and "
                "falling-N for N impressions, for example drift-400k"
            )
        kind, number, thousands = found.groups()
        return cls(name, int(number) * _THOUSANDS[thousands], _DRIFTS[kind])

    @property
    def change(self) -> int | None:
        """The number of the first example after a change of the click rate, or None."""
        return self.impressions // 2 if self.drift == "rate" else None

    def write(self, directory: Path, seed: int) -> Path:
        """Return the path of the log; a simulated one is written into the directory.

        Raises `NotRun` when there is no such file.
        """
        if self.path is not None:
            if not self.path.exists():
                raise NotRun(f"there is no {self.path}: set STREAM_CTR_DATA")
            return self.path
        path = directory / f"{self.name}.jsonl"
        options = ["--impressions", self.impressions, "--seed", seed, "--drift", self.drift]
        done = stream_ctr("simulate", *options, "--out", path)
        if done.returncode:
            raise NotRun(_last_line(done.stderr))
        return path


def stream_ctr(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of this checkout's stream-ctr."""
    command = [sys.executable, "-m", "stream_ctr", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


# -- ours, and River in a run of ours ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ours:
    """`stream-ctr run` with options. The figures are those of `model`, or of the published one."""

    name: str
    options: tuple[str, ...] = ()
    model: str = ""


def batch(size: int) -> tuple[str, str]:
    return "-X", f"learn.batch_size={size}"


def ours() -> list[Ours]:
    """Return our contenders; the batch size of the defaults is not among the others."""
    sizes = [
        size for size in BATCH_SIZES if size != configuration.load(environ={}).learn.batch_size
    ]
    one_step = ("--model", "deepfm", "-X", "learn.table_optimizer=adagrad")
    not_served = [Ours("defaults, not scored as served", ("-X", f"{_SERVED_SHARE}=0"))]
    return [
        Ours(DEFAULTS),
        *(not_served if _SERVED_SHARE in configuration.known_keys() else []),
        *(Ours(batch_name(size), batch(size)) for size in sizes),
        Ours("DeepFM alone", ("--model", "deepfm")),
        *(Ours(f"{ONE_STEP}, {size:,}", (*one_step, *batch(size))) for size in (512, 4096)),
        Ours("FM alone", ("--model", "fm")),
        Ours("exact FTRL alone", ("--model", "lr")),
        Ours("River FTRL", ("--model", "lr", "-X", "baseline.enabled=true"), model="river_ftrl"),
    ]


@dataclass(frozen=True, slots=True)
class Learned:
    """What a run of ours left behind."""

    manifest: Manifest
    run: WholeRun
    report: Mapping[str, Any]
    message: str
    """The last line of a run that ended with a status other than 0."""

    @property
    def ftrl(self) -> str:
        """The name of exact FTRL in this run. Raises `NotRun` if it is not part of it."""
        name = next((name for name in FTRL_NAMES if name in self.run.models), None)
        if name is None:
            raise NotRun("exact FTRL is not part of the run")
        return name


def learn(log: Path, contender: Ours, seed: int, state: Path) -> Learned:
    """Run `stream-ctr run` on the log to its end. Raises `NotRun` when it has no final report."""
    given = ["-X", "baseline.enabled=false", "-X", f"learn.seed={seed}", *contender.options]
    done = stream_ctr("run", "--source", log, "--state", state, "--until-end", *given)
    reports = state / "reports.jsonl"
    report = json.loads(reports.read_text().splitlines()[-1]) if reports.exists() else {}
    if report.get("kind") != "final":
        raise NotRun(f"ended with status {done.returncode}: {_last_line(done.stderr)}")
    manifest, run = final_snapshot(state)
    if manifest.examples != report["examples"]:
        raise NotRun("its last snapshot does not hold the whole run")
    message = f"status {done.returncode}: {_last_line(done.stderr)}" if done.returncode else ""
    return Learned(manifest, run, report, message)


@dataclass(frozen=True, slots=True)
class Reference:
    """The first run of ours on a log, and the examples that every contender learns.

    `change` is the number of the first example after a change of the click rate, or None.
    """

    learned: Learned
    examples: Examples
    change: int | None

    @property
    def true_probability(self) -> npt.NDArray[np.float64]:
        return self.examples.true_probability


def our_result(contender: Ours, learned: Learned, reference: Reference) -> dict[str, Any]:
    """Return the figures of a run as JSON."""
    model = contender.model or learned.run.models[0]
    report = {key: value for key, value in learned.report.items() if key not in _NOT_KEPT}
    return {
        "contender": contender.name,
        "options": list(contender.options),
        "model": model,
        "events_per_second": learned.report["events_per_second"],
        **scores(learned.run, model, learned, reference),
        "models": {
            name: {part: part_figures(learned.run, name, part)["logloss"] for part in PARTS}
            for name in learned.run.models
        },
        **_as_served(learned.report),
        "report": report,
        **({"message": learned.message} if learned.message else {}),
    }


def _as_served(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of what was served, and of the progressive predictions of the same."""
    tables = {"whole": "as_served", "last_half": "as_served_last_half"}
    found = {
        part: {
            name: {score: figures[score] for score in (*_SCORES, "count")}
            for name, figures in report[table]["models"].items()
        }
        for part, table in tables.items()
        if table in report
    }
    return {"as_served": found} if found else {}


def scores(run: WholeRun, model: str, beside: Learned, reference: Reference) -> dict[str, Any]:
    """Return the scores of a model on each part.

    Its differences are from exact FTRL of the run `beside`.
    """
    pair = Pair(run, model, beside.run, beside.ftrl)
    found: dict[str, Any] = {}
    for part in PARTS:
        figures = part_figures(run, model, part)
        interval = difference(pair, part)
        found[part] = {
            **{name: figures[name] for name in _SCORES},
            "above_ftrl": [interval[name] for name in ("logloss_difference", "low", "high")],
        }
    if reference.change is not None:
        found["recovery"] = recovery(run, model, reference.change, reference.true_probability)
    return found


def joined(log: Path, learned: Learned) -> Examples:
    """Return the examples of a run, read again from its log.

    Raises `NotRun` when they are not those in the ledger of the run.
    """
    manifest = learned.manifest
    defaults = configuration.load(environ={})
    stream = open_log(log)
    source = BatchSource(lambda: (part.value for part in stream.batches()), name=stream.identity)
    hasher = Hasher(**structs.asdict(manifest.schema))
    joiner = LabelJoiner(
        fields=len(hasher.fields) + len(hasher.crosses),
        value_fields=len(hasher.value_fields),
        id_bits=manifest.schema.table_bits,
        label_window_ms=manifest.join.label_window_ms,
        early_click_wait_ms=manifest.join.early_click_wait_ms,
        duplicate_horizon_ms=manifest.join.duplicate_horizon_ms,
        max_bytes=configuration.size(defaults.join.max_memory),
    )
    marks = Watermarks(
        partitions=len(source.partitions),
        lateness_ms=manifest.join.allowed_lateness_ms,
        stall_clicks=defaults.join.stall_clicks,
    )
    ingest = Ingest(source, Decoder(hasher.fields), hasher)
    examples = Examples.concat(list(JoinedLog(ingest, joiner, marks)))
    ledger = Ledger().add(examples.id_hash, examples.label)
    if (ledger.count, ledger.sum) != (manifest.ledger.count, manifest.ledger.sum):
        raise NotRun("the examples that were read again are not those of the run")
    return examples


# -- Vowpal Wabbit -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vowpal:
    """A learner of Vowpal Wabbit, and the options that give its rates."""

    name: str
    options: str
    rates: tuple[str, ...]


_SGD_RATES = tuple(f"-l {rate:g}" for rate in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0))
_FTRL_RATES = tuple(
    f"--ftrl_alpha {alpha:g} --l2 {l2}"
    for l2 in (0, 1)
    for alpha in (0.002, 0.005, 0.02, 0.05, 0.1, 0.3)
)
VOWPAL = (
    Vowpal("Vowpal Wabbit", "", _SGD_RATES),
    Vowpal("Vowpal Wabbit -q ::", "-q ::", _SGD_RATES),
    Vowpal("Vowpal Wabbit --ftrl -q ::", "--ftrl --ftrl_beta 1 -q ::", _FTRL_RATES),
)
_VOWPAL_BITS = 22
_CHOSEN_ON = 5  # rates are chosen on the first one in so many examples


def vowpal_results(
    contenders: Sequence[Vowpal], reference: Reference, bench: Bench
) -> Iterator[dict[str, Any]]:
    """Yield the result of each learner with the rate chosen, and with the best in hindsight."""
    directory = bench.directory / "vowpal"
    directory.mkdir()
    np.save(directory / "ids.npy", reference.examples.ids)
    np.save(directory / "labels.npy", reference.examples.label)
    text = zipf.write_vowpal(directory, directory / "vowpal.txt")
    for contender in contenders:
        try:
            yield from _with_each_rate(contender, text, reference, bench)
        except NotRun as error:
            say(f"{contender.name}: not run: {error}")
            yield {"contender": contender.name, "not_run": str(error)}


def _with_each_rate(
    contender: Vowpal, text: Path, reference: Reference, bench: Bench
) -> Iterator[dict[str, Any]]:
    """Run a learner with each rate; yield the chosen one, and the best in hindsight."""
    learned = reference.learned
    labels = reference.examples.label
    first_fifth = slice(0, len(labels) // _CHOSEN_ON)
    grid: dict[str, list[float]] = {}
    results: dict[str, dict[str, Any]] = {}
    for rate in contender.rates[:: 3 if bench.quick else 1]:
        options = f"{contender.options} {rate}".strip()
        logits, seconds = _predictions(options, text, bench)
        run = predicted(contender.name, logits, labels)
        found = scores(run, contender.name, learned, reference)
        begin = losses(logits[first_fifth], labels[first_fifth]).mean()
        grid[options] = [float(begin), *(found[part]["logloss"] for part in PARTS)]
        results[options] = {
            "contender": contender.name,
            "options": options.split(),
            "model": "vowpal",
            "events_per_second": round(learned.report["events"] / seconds, 1),
            **found,
        }
        say(f"{contender.name} {rate}: {grid[options][1]:.5f}")
    chosen = min(grid, key=lambda options: grid[options][0])
    best = min(grid, key=lambda options: grid[options][1])
    yield {**results[chosen], "grid": grid}
    yield {**results[best], "contender": f"{contender.name}{IN_HINDSIGHT}"}


def _predictions(options: str, text: Path, bench: Bench) -> tuple[npt.NDArray[np.float64], float]:
    """Return the progressive logits [n] of Vowpal Wabbit, and how many seconds it took."""
    predictions = text.with_name("predictions.txt")
    files = ["--text", text, "--predictions", predictions]
    given = [*files, "--", options, "-b", _VOWPAL_BITS]
    with contextlib.ExitStack() as stack:
        program = Program("Vowpal Wabbit", "vowpal_stream", given, bench.vowpal)
        measured = program.start(stack).measure()
    read = csv.read_csv(
        predictions,
        read_options=csv.ReadOptions(column_names=["logit"]),
        convert_options=csv.ConvertOptions(column_types={"logit": pa.float64()}),
    )
    return read["logit"].to_numpy(), measured["seconds"]


# -- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bench:
    """The options that all cases share, and a directory for what a case writes."""

    directory: Path
    vowpal: Peer
    quick: bool
    busy: bool
    only: str
    reports: Path | None

    def contenders(self) -> tuple[list[Ours], list[Vowpal]]:
        """Return the contenders whose names hold the text of --only."""
        return (
            [each for each in ours() if self.only in each.name],
            [each for each in VOWPAL if self.only in each.name],
        )


def case_name(stream: Stream, seed: int) -> str:
    return f"{stream.name}, seed {seed}"


def case(stream: Stream, seed: int, bench: Bench) -> dict[str, Any]:
    """Measure every contender on a log, and return the case as JSON.

    Raises `NotRun` when there is no such log, or none of our runs succeeds.
    """
    log = stream.write(bench.directory, seed)
    runs, vowpal = bench.contenders()
    reference: Reference | None = None
    results: list[dict[str, Any]] = []
    for contender in runs or [Ours(DEFAULTS)]:
        say(f"{case_name(stream, seed)}: {contender.name}")
        try:
            with tempfile.TemporaryDirectory(dir=bench.directory) as state:
                learned = learn(log, contender, seed, Path(state))
            reference = reference or Reference(learned, joined(log, learned), stream.change)
            results.append(our_result(contender, learned, reference))
            _keep_report(bench, stream, seed, contender, learned)
        except NotRun as error:
            say(f"{contender.name}: not run: {error}")
            results.append({"contender": contender.name, "not_run": str(error)})
    if reference is None:
        raise NotRun(f"none of our runs succeeded on {stream.name}: {results[0]['not_run']}")
    results += vowpal_results(vowpal, reference, bench)
    return rounded(
        {
            "name": case_name(stream, seed),
            "log": stream.name,
            "seed": seed,
            "quick": bench.quick,
            "default_batch": configuration.load(environ={}).learn.batch_size,
            **_facts(reference.learned),
            "results": [{**each, "busy": True} if bench.busy else each for each in results],
        }
    )


def _facts(learned: Learned) -> dict[str, Any]:
    """Return what is known about the log, and the figures of exact FTRL on it."""
    facts: dict[str, Any] = {"examples": learned.run.count, "events": learned.report["events"]}
    for part in PARTS:
        found = part_figures(learned.run, learned.ftrl, part)
        kept = (*_SCORES, "count", "ctr", "constant_logloss", "best_possible_logloss")
        facts[part] = {name: found[name] for name in kept}
    return facts


def _keep_report(
    bench: Bench, stream: Stream, seed: int, contender: Ours, learned: Learned
) -> None:
    if bench.reports:
        bench.reports.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", f"{case_name(stream, seed)} {contender.name}")
        (bench.reports / f"{name}.json").write_text(json.dumps(learned.report, indent=1))


def rounded(content: Any) -> Any:
    """Return JSON content with its numbers rounded to six digits after the point.

    >>> rounded({"logloss": [0.123456789, None], "events": 3})
    {'logloss': [0.123457, None], 'events': 3}
    """
    if isinstance(content, dict):
        return {name: rounded(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    return round(content, _DIGITS) if isinstance(content, float) else content


def warm_up(contenders: Sequence[Ours]) -> None:
    """Run each contender once, so that the compiled loops that it needs are in the cache."""
    say("warming up")
    stream = Stream("warm-up", _WARM_UP_IMPRESSIONS)
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(NotRun):
        log = stream.write(Path(name), 0)
        for contender in contenders:
            state = Path(name) / contender.name
            with contextlib.suppress(NotRun):  # the case will show the reason
                learn(log, contender, 0, state)


def measure(
    arguments: argparse.Namespace, measured: Mapping[str, Any], command: str
) -> Iterator[dict[str, Any]]:
    """Run the cases that are not among `measured`, and yield each."""
    missing = [
        (stream, seed)
        for stream in map(Stream.named, arguments.logs or (QUICK_LOGS if arguments.quick else LOGS))
        for seed in arguments.seeds or (SEEDS[:1] if arguments.quick else SEEDS)
        if case_name(stream, seed) not in measured
    ]
    if missing:
        warm_up([each for each in ours() if arguments.only in each.name])
    for stream, seed in missing:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(
                directory=Path(directory),
                vowpal=Peer("vowpal", REQUIREMENTS["vowpal"], arguments.cache, arguments.offline),
                quick=arguments.quick,
                busy=arguments.busy,
                only=arguments.only,
                reports=arguments.reports,
            )
            try:
                found = case(stream, seed, bench)
            except NotRun as error:
                say(f"{case_name(stream, seed)}: not run: {error}")
                continue
        yield record(found, command, time.perf_counter() - began)


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="*", metavar="LOG", help="logs to learn; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; quick: 0")
    parser.add_argument("--quick", action="store_true", help="small streams, one seed, few rates")
    parser.add_argument("--missing", action="store_true", help="only what the JSON file lacks")
    parser.add_argument("--busy", action="store_true", help="measure no events/s")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="contenders with this in the name; in the JSON file, the others of a case stay",
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing, only write the page"
    )
    parser.add_argument("--offline", action="store_true", help="install nothing for Vowpal Wabbit")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures in this file")
    parser.add_argument("--page", type=Path, help="fill the block <!-- frontier --> of this page")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw this SVG file")
    parser.add_argument("--reports", type=Path, metavar="DIR", help="keep the final reports here")
    return parser


def main() -> None:
    parser = arguments_parser()
    arguments = parser.parse_args()
    for name in arguments.logs:
        try:
            Stream.named(name)
        except ValueError as error:
            parser.error(str(error))
    if arguments.render and not (arguments.json and arguments.json.exists()):
        parser.error("--render needs a --json file with figures")
    command = f"python tests/bench/frontier.py {shlex.join(sys.argv[1:])}".strip()
    kept = {each["name"]: each for each in _kept(arguments.json)}
    if not arguments.render:
        for found in measure(arguments, kept if arguments.missing else {}, command):
            earlier = kept.get(found["name"]) if arguments.only else None
            kept[found["name"]] = merged(earlier, found) if earlier else found
            if arguments.json:
                keep(list(kept.values()), arguments.json)
    if not kept:
        sys.exit("nothing was measured")
    render(list(kept.values()), arguments)


def merged(earlier: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a case with the new results in place of earlier ones of the same contenders.

    `earlier` holds the machine and the command of those that stay.
    """
    results = {each["contender"]: each for each in (*earlier["results"], *found["results"])}
    order = [*(each.name for each in ours()), *results]
    names = sorted(results, key=order.index)
    records = [
        *earlier.get("earlier", []),
        {name: earlier[name] for name in ("machine", "command")},
    ]
    return {
        **found,
        "earlier": records,
        "results": [results[name] for name in names],
    }


def render(cases: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the tables of the cases, fill the page and draw the figure."""
    ordered = sorted(cases, key=_place)
    block = frontier_page.block(ordered, arguments.figure, arguments.page)
    print(block)
    if arguments.figure:
        arguments.figure.write_text(frontier_figure.figure(ordered))
    if arguments.page:
        arguments.page.write_text(fill(arguments.page.read_text(), "frontier", block))


def _place(each: Mapping[str, Any]) -> tuple[int, str, int]:
    """Return the place of a case: in the order of `LOGS`, then by name and seed."""
    log = each["log"]
    return (LOGS.index(log) if log in LOGS else len(LOGS), log, each["seed"])


def keep(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the cases into the file, one result a line."""
    lines = []
    for each in cases:
        facts = json.dumps({name: value for name, value in each.items() if name != "results"})
        results = ",\n".join(map(json.dumps, each["results"]))
        lines.append(f'{facts[:-1]}, "results": [\n{results}\n]}}')
    joined_lines = ",\n".join(lines)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(f'{{"cases": [\n{joined_lines}\n]}}\n')
    os.replace(unfinished, path)


def _kept(path: Path | None) -> list[dict[str, Any]]:
    """Return the cases in the JSON file, if there is one."""
    if path is None or not path.exists():
        return []
    return cast(list[dict[str, Any]], json.loads(path.read_text())["cases"])


if __name__ == "__main__":
    main()
