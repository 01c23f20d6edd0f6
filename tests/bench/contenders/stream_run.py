"""Ours: `stream-ctr run --until-end` on a topic, timed from the first poll to the last step.

With `--join-only` nothing is learned. The first run is not counted, because it loads the compiled
functions. `--save` keeps the examples, for a contender that learns them from memory. Arguments
after `--` are options of `stream-ctr run`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from answers import Stopwatch, answer

from stream_ctr.cli import runs
from stream_ctr.cli.assembly import build_trainer
from stream_ctr.cli.main import main as stream_ctr
from stream_ctr.join.examples import Examples
from stream_ctr.train.report import to_json_object

NOTHING_PUBLISHED = ("metrics.topic=", "snapshots.topic=")
# No baseline and the smallest model: what remains is the pipeline that feeds the learner.
JOIN_ONLY = ("baseline.enabled=false", "ftrl.enabled=false", "model.hidden=1")


class Watch:
    """Times the run of a trainer. With `join_only` it counts batches instead of learning them."""

    def __init__(self, *, join_only: bool, keep: bool) -> None:
        self.kept: list[Examples] = []
        self.examples = 0
        self.labels = 0
        self.report: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._join_only = join_only
        self._keep = keep
        self._stopwatch = Stopwatch()

    def attach(self, trainer: Any) -> Any:
        """Replace methods of the trainer by timed ones, and return it."""
        run = trainer.run

        def timed() -> Any:
            self._stopwatch = Stopwatch()
            report = run()
            if not self._join_only:
                self._note_time()
            self.report = to_json_object(report)
            return report

        trainer.run = timed
        if self._join_only:
            trainer._learn = self._count
        return trainer

    def _count(self, batch: Examples) -> None:
        self.examples += len(batch)
        self.labels += int(batch.label.sum())
        if self._keep:
            self.kept.append(batch)
        self._note_time()

    def _note_time(self) -> None:
        self.seconds = self._stopwatch.seconds()


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
    command = ["run", "--topic", arguments.topic, "--bootstrap-servers", arguments.servers]
    command += ["--until-end", *arguments.run_options]
    for option in (*NOTHING_PUBLISHED, *(JOIN_ONLY if arguments.join_only else ())):
        command += ["-X", option]

    def measure() -> dict[str, Any]:
        watch = Watch(join_only=arguments.join_only, keep=arguments.save is not None)

        def build_watched(*arguments: Any, **options: Any) -> Any:
            return watch.attach(build_trainer(*arguments, **options))

        runs.build_trainer = build_watched  # type: ignore[attr-defined]
        with tempfile.TemporaryDirectory() as state:
            status = stream_ctr([*command, "--state", state], standalone_mode=False)
            # A run that learns nothing publishes nothing, which its status says.
            if status and not arguments.join_only:
                sys.exit(status)  # the command has printed the reason
        if arguments.save:
            save(watch.kept, arguments.save)
        report = watch.report
        measured = {"count": report["events"], **watch.seconds}
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
