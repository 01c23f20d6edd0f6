"""A pipeline without this package: kafka-python, `json.loads`, a dict of impressions, and River.

`--model none` stops at the join. The watermark of a partition is its latest event time. The minimum
over the partitions closes the windows.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from answers import Stopwatch, answer
from events import read
from river import linear_model, optim

Example = tuple[dict[str, Any], int]


def joined(
    servers: str, topic: str, at_most: int, window_ms: int, tally: dict[str, int]
) -> Iterator[Example]:
    """Yield (features, label) of each impression whose window has closed, and count the events."""
    pending: dict[str, list[Any]] = {}
    order: deque[tuple[int, str]] = deque()
    latest: dict[int, int] = {}
    for partition, event in read(servers, topic, at_most):
        tally["events"] += 1
        now = latest[partition] = max(latest.get(partition, 0), event["time"])
        if event["kind"] == "impression":
            pending[event["impression_id"]] = [event["features"], 0, event["time"]]
            order.append((event["time"], event["impression_id"]))
        else:
            waiting = pending.get(event["impression_id"])
            if waiting is not None and event["time"] <= waiting[2] + window_ms:
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
    """Return the features of River's model: texts one-hot by name and value, numbers unchanged."""
    x: dict[str, float] = {}
    for name, value in features.items():
        if isinstance(value, str):
            x[f"{name}={value}"] = 1.0
        else:
            x[name] = value
    return x


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--window-ms", type=int, required=True)
    parser.add_argument("--events", type=int, default=0, help="number of events to read; 0: all")
    parser.add_argument("--model", choices=["none", "river"], required=True)
    arguments = parser.parse_args()

    def measure() -> dict[str, float]:
        model = linear_model.LogisticRegression(
            optim.FTRLProximal(alpha=0.05, beta=1.0, l1=0.0, l2=1.0)
        )
        tally = {"events": 0, "examples": 0, "labels": 0}
        loss = 0.0
        stopwatch = Stopwatch()
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
        seconds = stopwatch.seconds()
        quality = {"logloss": loss / tally["examples"]} if arguments.model == "river" else {}
        return {"count": tally["events"], **seconds, **tally, **quality}

    answer(measure, note=f"the first {arguments.events:,} events" if arguments.events else "")


if __name__ == "__main__":
    main()
