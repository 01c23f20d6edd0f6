"""Alarms are logged when they begin and end, and reports list those that hold."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from support.trainers import Partitions, finish, stream, trainer  # noqa: F401 - a fixture

from stream_ctr.train.alarms import Alarms, RunAlarms
from stream_ctr.train.trainer import Surroundings


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_735_689_600.0

    def __call__(self) -> float:
        return self.seconds


def test_an_alarm_keeps_the_time_when_it_began_and_has_the_newest_text() -> None:
    clock = Clock()
    alarms = Alarms(clock)
    alarms.set("silent", True, "silent for 5 s")
    clock.seconds += 3
    alarms.set("stalled", True, "clicks are overdue")
    alarms.set("silent", True, "silent for 8 s")
    assert [tuple(raised) for raised in alarms.raised] == [
        ("silent", 1_735_689_600_000, "silent for 8 s"),
        ("stalled", 1_735_689_603_000, "clicks are overdue"),
    ]
    alarms.set("silent", False, "")
    clock.seconds += 3
    alarms.set("silent", True, "silent again")
    assert [(raised.name, raised.since_ms) for raised in alarms.raised] == [
        ("stalled", 1_735_689_603_000),
        ("silent", 1_735_689_606_000),
    ]


def test_an_alarm_is_logged_once_when_it_begins_and_once_when_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    alarms = Alarms(Clock())
    with caplog.at_level(logging.WARNING):
        for holds in (False, True, True, False, False):
            alarms.set("silent", holds, "no broker answers", over="a broker answers again")
            alarms.set("refused", holds, "the gate says so", over="no more", log=False)
    assert caplog.messages == ["no broker answers", "a broker answers again"]


def status(**changes: Any) -> Any:
    return SimpleNamespace(**{"lost": 0, "silent_seconds": 0.0, **changes})


def joiner(evicted: int = 0) -> Any:
    return SimpleNamespace(pending=7, counts=lambda: {"impressions_evicted": evicted})


def test_the_status_of_a_source_raises_its_alarms_and_lowers_them() -> None:
    counters: Counter[str] = Counter()
    alarms = RunAlarms([("clicks", 0)], counters, Clock())
    alarms.check(status(), joiner(), [])
    assert not alarms.raised
    alarms.check(status(lost=4, silent_seconds=6.0), joiner(evicted=1200), ["clicks:0"])
    texts: dict[str, str] = {raised.name: raised.text for raised in alarms.raised}
    assert list(texts) == ["lost", "silent", "stalled", "evicted"]
    assert texts["lost"].startswith("4 records are lost")
    assert texts["silent"] == "no broker has answered for 6 s; waiting"
    assert "clicks:0" in texts["stalled"]
    assert "7 impressions wait" in texts["stalled"]
    assert texts["evicted"].startswith("1,200 impressions evicted")
    alarms.check(status(lost=4), joiner(evicted=1200), [])
    assert [raised.name for raised in alarms.raised] == ["lost", "evicted"]
    assert counters["records_lost"] == 4


def test_a_report_lists_the_alarms_with_the_time_of_the_machine(
    tmp_path: Path,
    stream: pa.LargeBinaryArray,  # noqa: F811
) -> None:
    clock = Clock()
    calm = finish(trainer(tmp_path / "calm", Partitions([stream])))
    assert calm["refused"] == calm["alarms"] == []
    # Predictions that are random come from a model that learns too quickly.
    wild = finish(
        trainer(
            tmp_path / "wild",
            Partitions([stream]),
            learn={
                "batch_size": 128,
                "table_optimizer": "adagrad",
                "linear_learning_rate": 200.0,
                "table_learning_rate": 50.0,
            },
            snapshots={"gate_clicks": 50},
            surroundings=Surroundings(wall_clock=clock),
        )
    )
    assert wild["refused"]
    alarms = {alarm["name"]: alarm for alarm in wild["alarms"]}
    assert alarms["refused"] == {
        "name": "refused",
        "since": "2025-01-01T00:00:00.000Z",
        "text": f"snapshots are not published: {'; '.join(wild['refused'])}",
    }
