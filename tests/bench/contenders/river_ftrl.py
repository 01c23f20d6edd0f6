"""River's LogisticRegression with FTRLProximal, on dicts in memory, on one core.

Each example is predicted and then learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import river
from answers import Stopwatch, answer, on_one_core
from river import linear_model, optim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory written by zipf.write")
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument(
        "--events-per-example",
        type=float,
        default=1.0,
        help="count events instead of examples; some events have no example",
    )
    arguments = parser.parse_args()
    on_one_core()
    ids = np.load(arguments.data / "ids.npy")[: arguments.examples]
    labels = np.load(arguments.data / "labels.npy")
    examples = [
        (dict.fromkeys(row, 1.0), bool(label))
        for row, label in zip(ids.tolist(), labels, strict=False)
    ]

    def measure() -> dict[str, float]:
        model = linear_model.LogisticRegression(
            optim.FTRLProximal(alpha=0.1, beta=1.0, l1=0.0, l2=1.0)
        )
        stopwatch = Stopwatch()
        for x, label in examples:
            model.predict_proba_one(x)
            model.learn_one(x, label)
        count = len(examples) * arguments.events_per_example
        return {"count": count, **stopwatch.seconds()}

    answer(measure, note=f"River {river.__version__}, the first {len(examples):,} examples")


if __name__ == "__main__":
    main()
