"""Vowpal Wabbit's `--ftrl` on a file in its text format in the page cache, a new model each time.

With `--one-core`, its parser thread shares the core with the learner. The feature names are
numbers, which it uses as they are instead of hashing them. Its binary cache was no faster.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from answers import Stopwatch, answer, on_one_core
from vowpalwabbit import Workspace
from vowpalwabbit.version import __version__


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="file written by zipf.write_vowpal"
    )
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--one-core", action="store_true")
    arguments = parser.parse_args()
    if arguments.one_core:
        on_one_core()
    learner = "--ftrl --ftrl_alpha 0.1 --ftrl_beta 1 --l2 1 --loss_function logistic --quiet"

    def measure() -> dict[str, float]:
        stopwatch = Stopwatch()
        # The constructor learns the whole file.
        model = Workspace(f"{learner} -b {arguments.bits} -d {arguments.text}")
        model.finish()
        seconds = stopwatch.seconds()
        examples = model.get_weighted_examples()
        return {"count": examples, **seconds, "logloss": model.get_sum_loss() / examples}

    answer(measure, note=f"Vowpal Wabbit {__version__}, logloss {measure()['logloss']:.6f}")


if __name__ == "__main__":
    main()
