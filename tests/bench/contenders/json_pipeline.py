"""What one writes without this package: kafka-python, `json.loads`, a dict of pending impressions, and River for the model.

`--model none` stops at the join. The watermark of each partition is its latest event time; their least closes the windows.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from answers import answer
from events import read
from river import linear_model, optim

Example = tuple[dict[str, Any], int]


def joined(
    servers: str, topic: str, at_most: int, window_ms: int, tally: dict[str, int]
) -> Iterator[Example]:
    """(features, label) of each impression whose window has closed."""
    pending: dict[str, list[Any]] = {}
    order: deque[tuple[int, str]] = deque()
    latest: dict[int, int] = {}
    for partition, event in read(servers, topic, at_most):
        tally["events"] += 1
        now = latest[partition] = max(latest.get(partition, 0), event["time"])
        if event["kind"] == "impression":
            pending[event["impression_id"]] = [event["features"], 0, event["time"]]
            order.append((event["time"], event["impression_id"]))
        elif (waiting := pending.get(event["impression_id"])) is not None and event[
            "time"
        ] <= waiting[2] + window_ms:
            waiting[1] = 1
        if len(latest) > 1:
            now = min(latest.values())
        while order and order[0][0] + window_ms < now:
            features, label, _ = pending.pop(order.popleft()[1])
            yield features, label
    for _, identity in order:
        features, label, _ = pending.pop(identity)
        yield features, label


def sparse(features: dict[str, Any]) -> dict[str, float]:
    """One-hot by name for text, as they are for numbers."""
    return {(f"{name}={value}" if isinstance(value, str) else name): 1.0 if isinstance(value, str) else value
            for name, value in features.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--window-ms", type=int, required=True)
    parser.add_argument("--events", type=int, default=0, help="that are read; 0: all")
    parser.add_argument("--model", choices=["none", "river"], required=True)
    arguments = parser.parse_args()

    def measure() -> dict[str, float]:
        model = linear_model.LogisticRegression(
            optim.FTRLProximal(alpha=0.05, beta=1.0, l1=0.0, l2=1.0)
        )
        tally = {"events": 0, "examples": 0, "labels": 0}
        loss = 0.0
        began, processor = time.perf_counter(), time.process_time()
        for features, label in joined(
            arguments.servers, arguments.topic, arguments.events, arguments.window_ms, tally
        ):
            if arguments.model == "river":
                x = sparse(features)
                p = min(max(model.predict_proba_one(x)[True], 1e-15), 1 - 1e-15)
                loss -= math.log(p if label else 1 - p)
                model.learn_one(x, bool(label))
            tally["examples"] += 1
            tally["labels"] += label
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        quality = {"logloss": loss / tally["examples"]} if arguments.model == "river" else {}
        return {
            "count": tally["events"],
            "seconds": seconds,
            "processor_seconds": processor,
            **tally,
            **quality,
        }

    answer(measure, note=f"the first {arguments.events:,} events" if arguments.events else "")


if __name__ == "__main__":
    main()
