"""Vowpal Wabbit's `--ftrl`, from its own text format in the page cache, a new model each time; with `--one-core` its parser, which is
a thread beside the learner, shares the core with it.

The names of the features are numbers, which it takes as they are instead of hashing them. Its binary cache was no faster.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from answers import answer, on_one_core
from vowpalwabbit import Workspace
from vowpalwabbit.version import __version__


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="what zipf.write_vowpal has written"
    )
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--one-core", action="store_true")
    arguments = parser.parse_args()
    if arguments.one_core:
        on_one_core()
    learner = "--ftrl --ftrl_alpha 0.1 --ftrl_beta 1 --l2 1 --loss_function logistic --quiet"

    def measure() -> dict[str, float]:
        began, processor = time.perf_counter(), time.process_time()
        model = Workspace(
            f"{learner} -b {arguments.bits} -d {arguments.text}"
        )  # learns all of the file
        model.finish()
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        examples = model.get_weighted_examples()
        return {
            "count": examples,
            "seconds": seconds,
            "processor_seconds": processor,
            "logloss": model.get_sum_loss() / examples,
        }

    answer(measure, note=f"Vowpal Wabbit {__version__}, logloss {measure()['logloss']:.6f}")


if __name__ == "__main__":
    main()
