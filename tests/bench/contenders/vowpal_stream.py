"""Vowpal Wabbit on a file in its text format: one pass, each example predicted, then learned.

It writes the raw predictions (logits) with `-p`. Arguments after `--` are options of Vowpal Wabbit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from answers import Stopwatch, answer
from vowpalwabbit import Workspace
from vowpalwabbit.version import __version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    options = [*arguments.options, "--loss_function logistic --quiet"]
    files = f"-d {arguments.text} -p {arguments.predictions}"

    def measure() -> dict[str, float]:
        stopwatch = Stopwatch()
        model = Workspace(f"{' '.join(options)} {files}")  # learns the whole file
        model.finish()
        return {"count": model.get_weighted_examples(), **stopwatch.seconds()}

    answer(measure, note=f"Vowpal Wabbit {__version__}")


if __name__ == "__main__":
    main()
