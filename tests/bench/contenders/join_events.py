"""Ours: Kafka -> decode -> hash -> join. It is `stream-ctr run --until-end` with the learning left out.

`--save` keeps the examples, for a contender that learns them from memory.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from answers import answer

from stream_ctr import runs
from stream_ctr.cli import _load_config
from stream_ctr.join import Examples
from stream_ctr.lease import Lease

# No baseline, the smallest of models, nothing published: what is left is what a learner is fed by.
OPTIONS = ("baseline.enabled=false", "model.hidden=1", "model.table_bits=10", "metrics.topic=", "snapshots.topic=")


class Fed:
    """A trainer that `watch` has been given counts its batches instead of learning them."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.examples, self.labels = keep, 0, 0
        self.kept: list[Examples] = []
        self.began = self.ended = self.processor_began = self.processor_ended = 0.0

    def watch(self, trainer: Any) -> Any:
        run = trainer.run

        def timed() -> Any:
            self.began, self.processor_began = time.perf_counter(), time.process_time()
            return run()

        trainer.run, trainer._learn = timed, self.take
        return trainer

    def take(self, batch: Examples) -> None:
        self.examples += len(batch)
        self.labels += int(batch.label.sum())
        self.ended, self.processor_ended = time.perf_counter(), time.process_time()
        if self.keep:
            self.kept.append(batch)

    def save(self, directory: Path) -> None:
        examples = Examples.concat(self.kept)
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "ids.npy", examples.ids)
        np.save(directory / "labels.npy", examples.label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("-X", dest="extra", action="append", default=[], metavar="KEY=VALUE", help="as of stream-ctr run")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    extra = (*OPTIONS, *arguments.extra)
    config, properties = _load_config(None, extra, topic=arguments.topic, bootstrap_servers=arguments.servers)
    build = runs.build_trainer

    def measure() -> dict[str, float]:
        fed = Fed(keep=arguments.save is not None)
        runs.build_trainer = lambda *args, **options: fed.watch(build(*args, **options))
        with tempfile.TemporaryDirectory() as name, Lease(Path(name)) as lease:
            report = runs.train_on_kafka(runs.client(arguments.servers, None, properties), config, lease, until_end=True)
        if arguments.save:
            fed.save(arguments.save)
        processor = fed.processor_ended - fed.processor_began
        return {
            "count": report["events"], "seconds": fed.ended - fed.began, "processor_seconds": processor,
            "examples": fed.examples, "labels": fed.labels,
        }  # fmt: skip

    answer(measure)


if __name__ == "__main__":
    main()
