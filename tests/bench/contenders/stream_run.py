"""Ours: `stream-ctr run --until-end` on a topic, from the first poll to the last step; with `--join-only` the learning is left out.

One run of each process is not counted: in it the compiled loops are loaded. `--save` keeps the examples, for a contender that learns them
from memory. What follows `--` are options of `stream-ctr run`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from answers import answer

from stream_ctr.cli import runs
from stream_ctr.cli.main import main as stream_ctr
from stream_ctr.join.examples import Examples
from stream_ctr.train.report import to_json_object

NOTHING_PUBLISHED = ("metrics.topic=", "snapshots.topic=")
# Neither baseline, the smallest of models: what is left is what a learner is fed by.
JOIN_ONLY = ("baseline.enabled=false", "ftrl.enabled=false", "model.hidden=1")


class Watch:
    """Times the run of a trainer; with `join_only` that trainer counts its batches instead of learning them."""

    def __init__(self, *, join_only: bool, keep: bool) -> None:
        self._join_only, self._keep = join_only, keep
        self.kept: list[Examples] = []
        self.examples = self.labels = 0
        self._ended = self._processor_ended = 0.0
        self.report: dict[str, Any] = {}
        self.seconds = self.processor_seconds = 0.0

    def over(self, trainer: Any) -> Any:
        run = trainer.run

        def timed() -> Any:
            began, processor_began = time.perf_counter(), time.process_time()
            report = run()
            self.report = to_json_object(report)
            if not self._join_only:
                self._note_time()
            self.seconds, self.processor_seconds = (
                self._ended - began,
                self._processor_ended - processor_began,
            )
            return report

        trainer.run = timed
        if self._join_only:
            trainer._learn = self._take
        return trainer

    def _take(self, batch: Examples) -> None:
        self.examples += len(batch)
        self.labels += int(batch.label.sum())
        if self._keep:
            self.kept.append(batch)
        self._note_time()

    def _note_time(self) -> None:
        self._ended, self._processor_ended = time.perf_counter(), time.process_time()


def save(batches: list[Examples], directory: Path) -> None:
    examples = Examples.concat(batches)
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "ids.npy", examples.ids)
    np.save(directory / "labels.npy", examples.label)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--join-only", action="store_true")
    parser.add_argument("--save", type=Path)
    parser.add_argument("run_options", nargs="*")
    arguments = parser.parse_args()
    fixed = [*NOTHING_PUBLISHED, *(JOIN_ONLY if arguments.join_only else ())]
    command = [
        "run",
        "--topic",
        arguments.topic,
        "--bootstrap-servers",
        arguments.servers,
        "--until-end",
        *arguments.run_options,
    ]
    command += [word for option in fixed for word in ("-X", option)]
    build = runs.build_trainer

    def measure() -> dict[str, Any]:
        watch = Watch(join_only=arguments.join_only, keep=arguments.save is not None)
        runs.build_trainer = lambda *args, **options: watch.over(build(*args, **options))
        with tempfile.TemporaryDirectory() as state:
            if status := stream_ctr([*command, "--state", state], standalone_mode=False):
                sys.exit(status)  # it has said why
        if arguments.save:
            save(watch.kept, arguments.save)
        report = watch.report
        measured = {
            "count": report["events"],
            "seconds": watch.seconds,
            "processor_seconds": watch.processor_seconds,
        }
        if arguments.join_only:
            return measured | {"examples": watch.examples, "labels": watch.labels}
        logloss = {name: score["logloss"] for name, score in report["models"].items()}
        return measured | {
            "examples": report["examples"],
            "logloss": logloss,
            "profile": report["profile"],
        }

    measure()
    answer(measure)


if __name__ == "__main__":
    main()
