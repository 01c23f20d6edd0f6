"""The last words of a run: every model and every pair, over the whole run and its last half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from stream_ctr.cli.summary import summary
from stream_ctr.evaluate import metrics
from stream_ctr.snapshots.manifest import LedgerEntry
from stream_ctr.train.report import Profile, Report

MODELS = ("deepfm", "fm", "river_ftrl")


def whole_run(n: int, *, models: tuple[str, ...] = MODELS, share: float = 0.5) -> metrics.WholeRun:
    """Return n scored examples; the last model scored a share of them."""
    rng = np.random.default_rng(0)
    true = rng.normal(-1.0, 1.0, n)
    labels = (rng.random(n) < metrics.probabilities(true)).astype(np.uint8)
    chosen = rng.random(n) < share
    logits = {name: true + 0.1 * m for m, name in enumerate(models)}
    logits[models[-1]] = logits[models[-1]][chosen]
    run = metrics.WholeRun(models)
    masks = {models[-1]: chosen}
    run.add(metrics.Scored(np.arange(n), labels, metrics.probabilities(true), logits, masks))
    return run


def report_of(run: metrics.WholeRun, **changes: Any) -> Report:
    """Return a last report with these metrics."""
    known = {
        "run": "0" * 32,
        "kind": "final",
        "time": "2025-01-01T00:00:00.000Z",
        "examples": run.count,
        "events": 0,
        "seconds": 1.0,
        "events_per_second": 1.0,
        "event_time": None,
        "watermark": None,
        "pending": 0,
        "pending_bytes": 0,
        "lag": 0,
        "published": None,
        "alarms": [],
        "snapshot": "00000001-20250101T000000Z",
        "stalled": [],
        "silent_seconds": 0.0,
        "refused": [],
        "withheld": [],
        "left_out": {},
        "counters": {"rejected": 3, "clicks_late": 0},
        "clicks_late": 0,
        "click_coverage": 1.0,
        "ledger": LedgerEntry(run.count, 0),
        "profile": Profile(bound="source", reader={}, trainer={}),
        "last_half": msgspec.to_builtins(run.summary(last=0.5)),
        **msgspec.to_builtins(run.summary()),
    }
    return replace(msgspec.convert(msgspec.to_builtins(known), Report), **changes)


def lines(report: Report) -> list[str]:
    return summary(report, Path("state")).splitlines()


def test_each_model_has_a_line_with_the_whole_run_and_the_last_half() -> None:
    run = whole_run(4000)
    printed = lines(report_of(run))
    assert printed[0].startswith("final: 4,000 examples; 3 rejected; snapshot state/snapshots/0000")
    assert printed[1].split() == ["whole", "run", "last", "half"]
    assert printed[2].split() == ["model", *["logloss", "AUC", "pred/actual"] * 2]
    whole, half = run.summary(), run.summary(last=0.5)
    for line, name in zip(printed[3:6], MODELS, strict=True):
        cells = [name]
        for scope in (whole, half):
            score = scope.models[name]
            cells += [
                f"{score.logloss:.5f}",
                f"{score.auc:.4f}",
                f"{score.pred_over_actual:.3f}",
            ]
        assert line.split() == cells
    constant = [f"{scope.constant_logloss:.5f}" for scope in (whole, half)]
    assert printed[6].split() == ["constant", *constant]
    best = [f"{scope.best_possible_logloss:.5f}" for scope in (whole, half)]
    assert printed[7].split() == ["best", "possible", *best]


def test_each_pair_has_a_line_with_its_intervals_on_the_examples_of_both() -> None:
    run = whole_run(4000)
    printed = lines(report_of(run))[8:]
    assert len(printed) == 4
    for line, name in zip(printed[2:], MODELS[1:], strict=True):
        cells = ["deepfm", "-", name]
        for scope in (run.summary(), run.summary(last=0.5)):
            pair = scope.pairs[name]
            cells += [f"{pair.count:,}", f"{pair.logloss_difference:+.5f}"]
            cells += [f"{pair.low:+.5f}", "to", f"{pair.high:+.5f}"]
        assert line.split() == cells


def test_one_model_alone_has_no_pairs() -> None:
    printed = lines(report_of(whole_run(4000, models=("deepfm",), share=1.0)))
    assert [line.split()[0] for line in printed[2:]] == ["model", "deepfm", "constant", "best"]


def test_a_figure_that_is_not_known_is_a_dash() -> None:
    empty = lines(report_of(metrics.WholeRun(MODELS)))
    assert empty[3].split() == ["deepfm", *"------"]
    assert empty[-1].split() == ["deepfm", "-", "river_ftrl", *["0", "-", "no", "interval"] * 2]
    few = lines(report_of(whole_run(100)))  # two blocks make no interval
    assert few[-1].count("no interval") == 2


def test_a_report_without_a_last_half_shows_the_whole_run() -> None:
    printed = lines(report_of(whole_run(4000), last_half=msgspec.UNSET))
    assert printed[1].split() == ["whole", "run"]


def test_what_was_not_learned_is_named_by_model() -> None:
    counters = {"examples_skipped.fm": 2, "left_out.fm": 1, "clicks_unmatched": 4}
    report = report_of(whole_run(100), counters=counters, stalled=["clicks:0"], pending=9)
    assert lines(report)[0].startswith(
        "final: 100 examples; 4 clicks unmatched; 2 examples skipped by fm; "
        "left out after diverging: fm; 9 impressions wait for clicks that are overdue"
    )
