"""The effect of bfloat16 on the wire: one stream, served by fp32 and by bf16 deltas.

The default blend learns the stream of freshness.py. Every five seconds its touched rows are taken
once and encoded twice. One server applies the fp32 payloads, another the bf16 ones, and both
predict the impressions of the next five seconds, each from what it was sent alone. The trainer's
own predictions at these moments stand beside them. All servers begin with the same weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from support.record import formatted

from bench import freshness
from bench.drifting import examples_of
from bench.freshness import Blended, Case, Ids, Logits, Schedule
from bench.progressive import Pair, difference, part_figures
from stream_ctr.learn.blend import Blend, BlendPredictor
from stream_ctr.learn.runtimes import make_predictor
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.delta import Changes, Precision, decode_payload, encode_payload

EVERY_SECONDS = 5.0
LIVE = "trainer"
CASES = ("none", "weights-4")
Result = dict[str, Any]


class Server:
    """The models of a blend, which change by payloads alone."""

    def __init__(self, model: Blended, precision: Precision) -> None:
        blend = Blend(model.blend.members)
        blend.load_weights(model.blend.weights())
        members = {
            name: make_predictor(spec, model.learners[name].weights(), runtime="torch")
            for name, spec in model.specs.items()
        }
        self.precision = precision
        self.model = BlendPredictor(blend, members)
        self.bytes = 0

    def apply(self, changes: Changes) -> None:
        """Encode the changes as a payload, and apply what is decoded from it."""
        payload = encode_payload(changes, self.precision)
        self.bytes += len(payload)
        arrays = decode_payload(payload, self.precision)
        self.model = self.model.updated(by_member(arrays))
        self.model.absorb()


def by_member(changes: Changes) -> dict[str, Mapping[str, Any]]:
    """Return the arrays by the names of members, those of the blend by the empty name."""
    return {stem.removesuffix("model").rstrip("."): named for stem, named in changes.items()}


def changes_of(model: Blended) -> Changes:
    """Take what the models have changed since the last call."""
    changes: dict[str, Mapping[str, Any]] = {
        snapshot.stems(name)[0]: learner.take_changes() for name, learner in model.learners.items()
    }
    return {snapshot.stems()[0]: model.blend.weights(), **changes}


def measure(options: argparse.Namespace) -> Result:
    """Return the figures of each case and seed."""
    names = CASES[1:] if options.quick else CASES
    return {
        name: [one(freshness.CASES[name], seed, options) for seed in options.seeds]
        for name in names
    }


def one(case: Case, seed: int, options: argparse.Namespace) -> Result:
    """Return the logloss of the servers and of the trainer on a stream."""
    settings = freshness.defaults(quick=options.quick)
    schema, specs = freshness.described(settings)
    window_ms = round(1000 * settings.window)
    stream = freshness.stream_of(case, seed, settings)
    hasher = freshness.hasher_of(schema)
    examples = examples_of(stream, hasher, window_ms=window_ms)
    ends = freshness.batch_ends(len(examples), settings.batch)
    model = Blended(specs)
    for learner in model.learners.values():
        learner.track_touched()
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    servers = [Server(model, precision) for precision in precisions]

    def serve(ids: Ids) -> dict[str, Logits]:
        changes = changes_of(model)
        found: dict[str, Logits] = {LIVE: model.predict(ids)}
        for server in servers:
            server.apply(changes)
            found[server.precision] = server.model.predict(ids)
        return found

    schedule = Schedule.every(
        EVERY_SECONDS,
        examples.time,
        ends,
        window_ms=window_ms,
        transfer_ms=round(1000 * settings.transfer),
    )
    chosen = freshness.chosen_part(examples, settings)
    logits = freshness.serve_while_learning(examples, model, ends, [(schedule, serve)], chosen)
    del logits[freshness.PROGRESSIVE]
    run = freshness.tallied(examples, logits)
    parts = {name: part_figures(run, name, "whole") for name in run.models}
    gap = {
        name: float(np.nanmax(np.abs(probability(logits[name]) - probability(logits[LIVE]))))
        for name in precisions
    }
    return {
        "seed": seed,
        "count": parts[LIVE]["count"],
        "logloss": {name: part["logloss"] for name, part in parts.items()},
        "largest_difference": gap,
        "deltas": len(schedule.batches),
        "bytes": {server.precision: server.bytes for server in servers},
        "difference": difference(Pair(run, "bf16", run, "fp32"), "whole"),
    }


def probability(logits: Logits) -> Logits:
    return 1 / (1 + np.exp(-logits))


def table(results: Result) -> str:
    rows: list[list[object]] = []
    for case, seeds in results.items():
        losses = [
            statistics.fmean(seed["logloss"][name] for seed in seeds)
            for name in (LIVE, "fp32", "bf16")
        ]
        found = freshness.interval([seed["difference"] for seed in seeds])
        largest = [
            max(seed["largest_difference"][name] for seed in seeds) for name in ("fp32", "bf16")
        ]
        sent = [
            statistics.fmean(seed["bytes"][name] / seed["deltas"] / 1e6 for seed in seeds)
            for name in ("fp32", "bf16")
        ]
        rows.append(
            [
                *(freshness.CASES[case].title, len(seeds), *(f"{loss:.6f}" for loss in losses)),
                shown(*found),
                *(f"{value:.1e}" for value in largest),
                " / ".join(f"{size:.2f}" for size in sent),
            ]
        )
    header = [
        *("drift", "seeds", "trainer's own", "fp32 deltas", "bf16 deltas", "bf16 - fp32 [95 %]"),
        *("largest difference in p from the trainer, fp32", "bf16", "MB a delta, fp32 / bf16"),
    ]
    return formatted(header, rows)


def shown(mean: float, low: float | None, high: float | None) -> str:
    """Return a difference with its interval.

    >>> shown(1e-6, -2e-6, 4e-6)
    '+1.0e-06 [-2.0e-06, +4.0e-06]'
    """
    if low is None or high is None:
        return f"{mean:+.1e}"
    return f"{mean:+.1e} [{low:+.1e}, {high:+.1e}]"
