"""River's LogisticRegression with FTRLProximal, each example predicted and then learned, on dicts that are there; on one core."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import river
from answers import answer, on_one_core
from river import linear_model, optim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="what zipf.write has written")
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument(
        "--events-per-example",
        type=float,
        default=1.0,
        help="count events, of which some are not among the examples",
    )
    arguments = parser.parse_args()
    on_one_core()
    ids, labels = (
        np.load(arguments.data / "ids.npy")[: arguments.examples],
        np.load(arguments.data / "labels.npy"),
    )
    examples = [
        (dict.fromkeys(row, 1.0), bool(label))
        for row, label in zip(ids.tolist(), labels, strict=False)
    ]

    def measure() -> dict[str, float]:
        model = linear_model.LogisticRegression(
            optim.FTRLProximal(alpha=0.1, beta=1.0, l1=0.0, l2=1.0)
        )
        began, processor = time.perf_counter(), time.process_time()
        for x, label in examples:
            model.predict_proba_one(x)
            model.learn_one(x, label)
        count = len(examples) * arguments.events_per_example
        return {
            "count": count,
            "seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - processor,
        }

    answer(measure, note=f"River {river.__version__}, the first {len(examples):,} examples")


if __name__ == "__main__":
    main()
