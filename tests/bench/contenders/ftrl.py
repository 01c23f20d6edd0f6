"""Ours: `stream_ctr.learn.ftrl.FTRL` with ids in memory, a new model each time, on one core."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from answers import Stopwatch, answer, on_one_core

from stream_ctr.learn.ftrl import FTRL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory written by zipf.write")
    parser.add_argument("--bits", type=int, required=True)
    arguments = parser.parse_args()
    on_one_core()
    ids = np.load(arguments.data / "ids.npy")
    labels = np.load(arguments.data / "labels.npy")

    def measure() -> dict[str, float]:
        model = FTRL(table_bits=arguments.bits, alpha=0.1, beta=1.0, l1=0.0, l2=1.0)
        stopwatch = Stopwatch()
        logits = model.learn(ids, labels)
        seconds = stopwatch.seconds()
        loss = float(np.mean(np.logaddexp(0, logits) - labels * logits))
        return {"count": len(ids), **seconds, "logloss": loss}

    measure()
    answer(measure, note=f"{len(ids):,} examples, logloss {measure()['logloss']:.6f}")


if __name__ == "__main__":
    main()
