"""The first ten minutes with one's own data: `init`, a log, a topic and a subscriber.

The columns have names of a shop that nothing here knows; the clicks depend on two of them.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from support.commands import own_topics, succeed
from support.lineage import SMALL, last_report, newest
from support.topics import sent

from stream_ctr.snapshots.pointer import read_pointer

FIRST, THEN, STREAMED = 3000, 2000, 1000  # rows of a file, of a folder and of a topic
SECONDS_BETWEEN = 5
BEGIN = np.datetime64("2026-03-01T08:00:00")


def shop(rows: range) -> pa.Table:
    """Return labelled rows, one each five seconds, in local time without a zone."""
    rng = np.random.default_rng(rows.start)
    campaign, shelf = rng.integers(30, size=len(rows)), rng.integers(5, size=len(rows))
    log_odds = -1.8 + 1.4 * np.sin(campaign) + 0.9 * (shelf == 3)
    clicked = rng.random(len(rows)) < 1 / (1 + np.exp(-log_odds))
    time = BEGIN + np.asarray(rows) * np.timedelta64(SECONDS_BETWEEN, "s")
    return pa.table(
        {
            "Auktion_ID": [f"{row:08x}" for row in rows],
            "Zeitpunkt": [str(moment).replace("T", " ") for moment in time],
            "Kampagne": [f"k-{number}" for number in campaign],
            "regal": shelf,
            "Preis": np.round(rng.gamma(2.0, 9.0, len(rows)), 2),
            "geklickt": clicked.astype(np.int8),
            "notiz": ['5 €; "neu"'] * len(rows),
        }
    )


def streamed(table: pa.Table) -> pa.LargeBinaryArray:
    """Return the rows as a producer's events: an impression each, and two seconds later a click."""
    events: list[dict[str, Any]] = []
    for row in table.to_pylist():
        identity, time = row["Auktion_ID"], row["Zeitpunkt"].replace(" ", "T")
        features = {name: row[name] for name in ("Kampagne", "regal", "Preis")}
        impression = {"kind": "impression", "impression_id": identity, "time": f"{time}Z"}
        events.append({**impression, "features": features})
        if row["geklickt"]:
            later = np.datetime64(time) + np.timedelta64(2, "s")
            events.append({"kind": "click", "impression_id": identity, "time": f"{later}Z"})
    return pa.array([json.dumps(event).encode() for event in events], pa.large_binary())


def as_file(folder: Path, rows: range) -> Path:
    path = folder / "klicks.csv"
    pa.csv.write_csv(shop(rows), path, pa.csv.WriteOptions(delimiter=";"))
    return path


def as_folder(folder: Path, rows: range) -> Path:
    path = folder / "logs"
    path.mkdir()
    half = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    for number, part in enumerate(half):
        pa.parquet.write_table(shop(part), path / f"part-{number}.parquet")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [(as_file, as_folder), pytest.param((as_folder, as_file), marks=pytest.mark.long)],
    ids=["file first", "folder first"],
)
def test_a_file_a_folder_and_a_topic_that_init_never_saw_teach_one_model(
    order: tuple[Any, Any], broker: str, topic: str, tmp_path: Path
) -> None:
    first = order[0](tmp_path, range(FIRST))
    then = order[1](tmp_path, range(FIRST, FIRST + THEN))
    records = streamed(shop(range(FIRST + THEN, FIRST + THEN + STREAMED)))
    sent(broker, topic, records)

    written = tmp_path / "my.toml"
    written.write_text(succeed("init", first).stdout)
    state = ["--config", written, "--state", tmp_path / "state", *SMALL, *own_topics(topic)]
    succeed("run", "--source", first, "--keep-open", *state)
    after_first = last_report(tmp_path / "state")["examples"]
    succeed("run", "--source", then, "--keep-open", *state)
    succeed("run", "--topic", topic, "--bootstrap-servers", broker, "--until-end", *state)

    report = last_report(tmp_path / "state")
    total = FIRST + THEN + STREAMED
    assert 0 < after_first <= FIRST
    counters = report["counters"]
    assert report["examples"] == counters["labelled"] + counters["impressions"] == total
    assert counters["impressions"] == STREAMED
    assert counters["clicks_joined"] == len(records) - STREAMED
    assert counters["rejected"] == 0
    last_half = report["last_half"]["models"]
    assert last_half["blend"]["ne"] < 0.93
    assert last_half["blend"]["auc"] > 0.7

    told = tmp_path / "told"
    save = f"import sys; open({str(told)!r}, 'w').write(sys.argv[1])"
    hook = shlex.join([sys.executable, "-c", save]) + " {path}"
    succeed("subscribe", "--state", tmp_path / "state", "--once", "--exec", hook)
    pointer = read_pointer(tmp_path / "state" / "latest.json")
    taken = newest(tmp_path / "state")
    assert pointer
    assert taken
    assert Path(told.read_text()).name == pointer.snapshot
    assert taken.ledger[0] == total

    new = tmp_path / "neu.csv"
    pa.csv.write_csv(shop(range(total, total + 50)).drop_columns(["geklickt"]), new)
    config = tmp_path / "score.toml"
    config.write_text(re.sub(r"(?m)^delimiter = .*$", "", written.read_text()))
    scored = succeed("score", "--snapshot", tmp_path / "state", "--config", config, new)
    assert [line.split("\t")[0] for line in scored.stdout.splitlines()] == [
        f"{number:08x}" for number in range(total, total + 50)
    ]
