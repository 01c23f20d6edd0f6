"""The worth of freshness: logloss as served when weights are published every 10 min, 1 min, 5 s.

    python tests/bench/freshness.py               # all cases and five seeds, an hour on two cores
    python tests/bench/freshness.py --quick       # small and once, to see that it runs
    python tests/bench/freshness.py weights-4 --seeds 0 1 2        # one case; others stay
    python tests/bench/freshness.py --json docs/deltas.json --page docs/deltas.md
    python tests/bench/freshness.py --render --json docs/deltas.json --page docs/deltas.md

Cases
  none          the law of clicks stays (control)
  weights-1, weights-4
                the law of clicks becomes another one, once or four times in the hour
  rate-1, rate-4
                the click rate falls to a quarter and rises again, once or four times in the hour
  turning-4h, turning-1h
                the law changes gradually, with a full turn in four hours or in one

Method
  The stream is the simulated one at --rate impressions a second (see drifting.py). The default
  blend learns it in batches of --batch examples at most, in event-time order. All contenders share
  this one training, because publishing changes nothing that is learned. An example can be learned
  when its label window of --window seconds has closed. A publication at time P holds what could be
  learned by P, and serves the impressions from P + --transfer seconds on, until the next one does.
  So an impression is predicted by the weights that had learned what a server would have: --window
  seconds old at least, plus the age of the publication. Every publication passes the gate.

    10 min, 1 min, 5 s   publications at the multiples of this time
    each batch           a publication after each batch: no interval, the label window alone
    progressive          the weights just before the example is learned: no label window either

  A replay's own metrics as served cannot show five seconds: they keep four copies of the weights,
  and copy only when the examples grew by a quarter or by 65,536. Here nothing is copied, because
  each publication predicts at once what it will serve. The logits are those of AsServed, bit for
  bit, where it has a copy of the same weights (test_bench_deltas.py).
  The first --warm-up minutes are not scored, then an hour is; the times of changes depend on the
  seed. A hash chooses the --share of the impressions that is scored. Differences are paired on the
  same impressions. Their interval over several seeds is Student's, of the seeds' differences; that
  of one seed is the bootstrap over blocks of our reports. The results do not depend on how fast or
  how busy the machine is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import formatted, machine  # noqa: E402

from bench.drifting import Change, DriftingStream, Examples, examples_of  # noqa: E402
from bench.kept import Kept  # noqa: E402
from bench.progressive import Pair, difference, part_figures  # noqa: E402
from stream_ctr.cli.assembly import run_identity  # noqa: E402
from stream_ctr.config import load  # noqa: E402
from stream_ctr.evaluate.metrics import Scored, WholeRun  # noqa: E402
from stream_ctr.events.features import Hasher, mix64  # noqa: E402
from stream_ctr.events.field import Schema  # noqa: E402
from stream_ctr.learn.blend import Blend  # noqa: E402
from stream_ctr.learn.learner import Learner, make_learner  # noqa: E402
from stream_ctr.learn.spec import LearnerSpec  # noqa: E402
from stream_ctr.learn.step import batch_size_after  # noqa: E402
from stream_ctr.logs.simulate import FIELDS, START_MS, Drift  # noqa: E402

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.floating]
Serve = Callable[[Ids], Mapping[str, Logits]]
"""The logits [n] of each contender for impressions with `ids` [n, F], by what is published now."""
Result = dict[str, Any]

INTERVALS = {"10 min": 600.0, "1 min": 60.0, "5 s": 5.0, "each batch": 0.0}
"""Seconds between two publications; 0 for one after each batch."""
PROGRESSIVE = "progressive"
PAIRS = (("5 s", "10 min"), ("5 s", "1 min"), ("each batch", "5 s"))
_HOUR = 3600.0
_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """A way in which the law of clicks changes: in jumps, or in turns of so many hours."""

    title: str
    drift: Drift = "none"
    jumps: int = 0
    turn_hours: float = 0.0

    def change(self, *, from_seconds: float, seconds: float, seed: int) -> Change:
        """Return the change; its jumps are spread over the scored part, at random times."""
        if not self.jumps:
            return Change(self.drift, turn_hours=self.turn_hours)
        every = seconds / self.jumps
        first = from_seconds + every * np.random.default_rng((seed, 2)).uniform(0.25, 0.75)
        times = START_MS + 1000 * (first + every * np.arange(self.jumps))
        return Change(self.drift, tuple(times.astype(int).tolist()))


CASES = {
    "none": Case("none"),
    "weights-1": Case("other weights, once", "weights", jumps=1),
    "weights-4": Case("other weights, four times", "weights", jumps=4),
    "rate-1": Case("a quarter of the clicks, once", "rate", jumps=1),
    "rate-4": Case("a quarter of the clicks and back, four times", "rate", jumps=4),
    "turning-4h": Case("weights turn in four hours", "weights", turn_hours=4.0),
    "turning-1h": Case("weights turn in an hour", "weights", turn_hours=1.0),
}
QUICK_CASES = ("none", "weights-1")


# -- what is learned -----------------------------------------------------------------------------


class Blended:
    """The models of a configuration and their blend, which learn in one process."""

    def __init__(self, specs: Mapping[str, LearnerSpec]) -> None:
        self.specs = dict(specs)
        self.learners: dict[str, Learner] = {
            name: make_learner(spec) for name, spec in specs.items()
        }
        self.blend = Blend(tuple(specs))

    def learn(self, ids: Ids, label: npt.NDArray[np.uint8]) -> Logits:
        """Learn a batch, and return the logits [n] from before."""
        logits: dict[str, Logits] = {}
        for name, learner in self.learners.items():
            found = learner.learn(ids, label)
            if found is None:
                raise RuntimeError(f"{name} refused a step on the simulated stream")
            logits[name] = found.numpy()
        return self.blend.learn(self.blend.stack(logits, len(ids)), label)

    def predict(self, ids: Ids) -> Logits:
        """Return the logits [n] of the present weights."""
        logits = {name: learner.predict(ids) for name, learner in self.learners.items()}
        return self.blend.predict(self.blend.stack(logits, len(ids)))


def described(options: argparse.Namespace) -> tuple[Schema, dict[str, LearnerSpec]]:
    """Return the schema and the models of the default configuration with the --batch given."""
    overrides: dict[str, Any] = {
        "learn": {"batch_size": options.batch},
        "baseline": {"enabled": False},
    }
    if options.quick:
        overrides["model"] = {"table_bits": 14, "hidden": [16], "embedding_dim": 4}
    identity = run_identity(load(environ={}, overrides=overrides), FIELDS)
    return identity.schema, identity.specs


def hasher_of(schema: Schema) -> Hasher:
    return Hasher(
        schema.fields,
        table_bits=schema.table_bits,
        hash_seed=schema.hash_seed,
        numeric_encoding=schema.numeric_encoding,
        buckets_per_octave=schema.buckets_per_octave,
    )


# -- who serves which impression -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Schedule:
    """The publications of a contender.

    The k-th one comes after `batches[k]` batches, at `at_ms[k]`, and serves the impressions from
    `first[k]` up to, without, `first[k + 1]`.
    """

    batches: npt.NDArray[np.int64]
    at_ms: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]

    @classmethod
    def every(
        cls,
        seconds: float,
        time: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        *,
        window_ms: int,
        transfer_ms: int,
    ) -> Schedule:
        """Return the publications every so many seconds of event time, 0 for each batch.

        `time` [n] are the impressions in their order, and `ends` [B] the end of each batch. A batch
        is learned when the window of its last example closes.

        >>> time = START_MS + 1000 * np.arange(60)
        >>> found = Schedule.every(
        ...     20, time, np.array([10, 20, 30, 40]), window_ms=5000, transfer_ms=1000
        ... )
        >>> found.batches.tolist(), found.first.tolist()  # after 20 s: examples 0 to 9, from 21 s
        ([1, 3], [21, 41, 60])
        """
        learned = time[ends - 1] + window_ms
        last = int(time[-1])
        step = round(1000 * seconds)
        at = np.arange(START_MS + step, last, step) if step else learned
        first = np.searchsorted(time, at + transfer_ms, side="left")
        return cls(np.searchsorted(learned, at, side="right"), at, np.append(first, len(time)))


def batch_ends(examples: int, largest: int) -> npt.NDArray[np.int64]:
    """Return the end of each whole batch, whose sizes are those of the online rule.

    >>> batch_ends(100, 4096).tolist()
    [16, 32, 48, 64, 80, 96]
    """
    ends: list[int] = []
    end = 0
    while (end := end + batch_size_after(end, largest)) <= examples:
        ends.append(end)
    return np.array(ends, np.int64)


def serve_while_learning(
    examples: Examples,
    model: Blended,
    ends: npt.NDArray[np.int64],
    contenders: Sequence[tuple[Schedule, Serve]],
    chosen: npt.NDArray[np.bool_],
) -> dict[str, Logits]:
    """Learn the batches; return the logits [n] of all contenders, NaN where there are none.

    `chosen` [n] marks the impressions that are predicted as served. Each contender is asked once
    a publication, for the impressions that it serves. The key `progressive` has the logits from
    before each step.
    """
    logits: dict[str, Logits] = defaultdict(lambda: np.full(len(examples), np.nan))
    due: dict[int, list[tuple[slice, Serve]]] = defaultdict(list)
    for schedule, serve in contenders:
        for k, batches in enumerate(schedule.batches.tolist()):
            served = slice(int(schedule.first[k]), int(schedule.first[k + 1]))
            due[batches].append((served, serve))
    begin = 0
    for number in range(len(ends) + 1):
        for served, serve in due[number]:
            rows = np.flatnonzero(chosen[served]) + served.start
            for name, found in serve(examples.ids[rows]).items():
                logits[name][rows] = found
        if number < len(ends):
            batch = slice(begin, int(ends[number]))
            begin = batch.stop
            logits[PROGRESSIVE][batch] = model.learn(examples.ids[batch], examples.label[batch])
    return dict(logits)


# -- one run -------------------------------------------------------------------------------------


def stream_of(case: Case, seed: int, options: argparse.Namespace) -> DriftingStream:
    """Return the stream of a case, of --warm-up minutes and --scored minutes."""
    warm = _MINUTE * options.warm_up
    scored = _MINUTE * options.scored
    change = case.change(from_seconds=warm, seconds=scored, seed=seed)
    return DriftingStream(change, seconds=warm + scored, rate=options.rate, seed=seed)


def chosen_part(examples: Examples, options: argparse.Namespace) -> npt.NDArray[np.bool_]:
    """Return which impressions are scored [n]: those after the warm-up, and a share of them."""
    hashed = mix64(np.arange(len(examples), dtype=np.uint64))
    share = hashed < np.uint64(options.share * (2.0**64 - 2048))
    warm_ms = round(1000 * _MINUTE * options.warm_up)
    return np.asarray(share & (examples.time >= START_MS + warm_ms))


def tallied(examples: Examples, logits: Mapping[str, Logits]) -> WholeRun:
    """Return the metrics of the impressions for which every contender has a logit."""
    known = np.logical_and.reduce([np.isfinite(found) for found in logits.values()])
    run = WholeRun(list(logits))
    run.add(
        Scored(
            examples.time[known],
            examples.label[known],
            examples.probability[known],
            {name: found[known] for name, found in logits.items()},
            {},
        )
    )
    return run


def measure(case: Case, seed: int, options: argparse.Namespace) -> Result:
    """Return the logloss of every contender on one stream, and the paired differences."""
    began = time.monotonic()
    schema, specs = described(options)
    window_ms = round(1000 * options.window)
    examples = examples_of(stream_of(case, seed, options), hasher_of(schema), window_ms=window_ms)
    ends = batch_ends(len(examples), options.batch)
    model = Blended(specs)
    transfer_ms = round(1000 * options.transfer)

    def contender(name: str, seconds: float) -> tuple[Schedule, Serve]:
        schedule = Schedule.every(
            seconds, examples.time, ends, window_ms=window_ms, transfer_ms=transfer_ms
        )
        return schedule, lambda ids: {name: model.predict(ids)}

    contenders = [contender(name, seconds) for name, seconds in INTERVALS.items()]
    chosen = chosen_part(examples, options)
    logits = serve_while_learning(examples, model, ends, contenders, chosen)
    logits[PROGRESSIVE][~chosen] = np.nan
    scored = {name: logits[name] for name in (*INTERVALS, PROGRESSIVE)}
    return {"seed": seed, **figures(tallied(examples, scored)), "seconds": time.monotonic() - began}


def figures(run: WholeRun) -> Result:
    """Return the scores of all contenders, and the differences of `PAIRS`."""
    parts = {name: part_figures(run, name, "whole") for name in run.models}
    first = parts[run.models[0]]
    return {
        "count": first["count"],
        "best_possible": first["best_possible_logloss"],
        "constant": first["constant_logloss"],
        "logloss": {name: part["logloss"] for name, part in parts.items()},
        "differences": {
            f"{name} - {other}": difference(Pair(run, name, run, other), "whole")
            for name, other in PAIRS
        },
    }


# -- several seeds -------------------------------------------------------------------------------


def interval(differences: Sequence[Mapping[str, Any]]) -> tuple[float, float | None, float | None]:
    """Return the mean difference over the seeds, and the ends of its 95 % interval.

    >>> seeds = [{"logloss_difference": value} for value in (-0.1, -0.2, -0.3)]
    >>> [round(value, 4) for value in interval(seeds)]
    [-0.2, -0.4484, 0.0484]
    """
    values = [found["logloss_difference"] for found in differences]
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, differences[0]["low"], differences[0]["high"]
    error = statistics.stdev(values) / len(values) ** 0.5
    half = float(student.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def table(results: Result) -> str:
    """Return the table of the cases."""
    names = [*INTERVALS, PROGRESSIVE]
    pairs = [f"{name} - {other}" for name, other in PAIRS]
    rows: list[list[object]] = []
    for case, seeds in results["cases"].items():
        losses = [
            *(statistics.fmean(seed["logloss"][name] for seed in seeds) for name in names),
            statistics.fmean(seed["best_possible"] for seed in seeds),
        ]
        cells = [shown(interval([seed["differences"][pair] for seed in seeds])) for pair in pairs]
        rows.append([CASES[case].title, len(seeds), *(f"{loss:.5f}" for loss in losses), *cells])
    return formatted(
        ["drift", "seeds", *names, "best possible", *(f"{pair} [95 %]" for pair in pairs)], rows
    )


def shown(found: tuple[float, float | None, float | None]) -> str:
    mean, low, high = found
    if low is None or high is None:
        return f"{mean:+.5f}"
    return f"{mean:+.5f} [{low:+.5f}, {high:+.5f}]"


def defaults(*, quick: bool) -> argparse.Namespace:
    """Return the options of this command as they are without arguments, for other scripts."""
    return checked(parser().parse_args(["--quick"] if quick else []))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="small and once")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rate", type=float, default=250.0, help="impressions a second")
    parser.add_argument("--batch", type=int, default=256, help="examples of a batch, at most")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of the label window")
    parser.add_argument("--transfer", type=float, default=1.0, help="seconds until it is served")
    parser.add_argument("--warm-up", type=float, default=20.0, help="minutes that are not scored")
    parser.add_argument("--scored", type=float, default=60.0, help="minutes that are scored")
    parser.add_argument("--share", type=float, default=0.25, help="of the impressions, scored")
    parser.add_argument("--missing", action="store_true", help="leave out what --json has")
    parser.add_argument("--render", action="store_true", help="fill the page from --json alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    return parser


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options as they are meant. An unknown case ends the program."""
    if unknown := set(options.cases) - set(CASES):
        parser().error(f"no case {', '.join(sorted(unknown))}; the cases are {', '.join(CASES)}")
    if options.quick:
        options.cases = options.cases or list(QUICK_CASES)
        options.seeds, options.share = options.seeds[:1], 1.0
        options.rate, options.warm_up, options.scored = 50.0, 11.0, 5.0
    if options.warm_up * _MINUTE < max(INTERVALS.values()) + options.window + options.transfer:
        parser().error("--warm-up is too short for a publication of every interval")
    return options


SETTINGS = ("rate", "batch", "window", "transfer", "warm_up", "scored", "share", "quick")


def main() -> None:
    options = checked(parser().parse_args())
    kept = Kept("freshness", {"freshness": table}, options.json, options.page)
    if options.render:
        kept.render()
        return
    settings = {name: getattr(options, name) for name in SETTINGS}
    cases: dict[str, list[Result]] = {}
    earlier = kept.read().get("freshness", {}).get("results", {})
    if earlier.get("settings") == settings:
        cases = earlier["cases"]
    for name in options.cases or CASES:
        done = [found["seed"] for found in cases.get(name, [])] if options.missing else []
        found = cases.get(name, []) if options.missing else []
        for seed in options.seeds:
            if seed not in done:
                found.append(measure(CASES[name], seed, options))
                print(f"{name}, seed {seed}: {found[-1]['logloss']}", flush=True)
                cases[name] = found
                kept.add("freshness", {"settings": settings, "cases": cases})
    print(f"\n{table({'cases': cases})}\n\n{machine()}")


if __name__ == "__main__":
    main()
