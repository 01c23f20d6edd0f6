"""What cannot be written or sent now does not stop learning, and is not forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stream_ctr.errors import BrokerError, ConfigError
from stream_ctr.outlet import Outlet


class Away(Exception):
    pass


class Broker:
    """A sink whose broker can go away."""

    def __init__(self) -> None:
        self.away = False
        self.sent: list[tuple[str, bytes]] = []

    def send(self, topic: str, value: bytes, **_: object) -> None:
        self.flush(0)
        self.sent.append((topic, value))

    def flush(self, timeout_seconds: float) -> None:
        if self.away:
            raise Away("nobody answers")


def test_a_broker_that_is_away_is_an_error_at_the_end_only(tmp_path: Path) -> None:
    broker = Broker()
    outlet = Outlet(tmp_path, sink=broker, unavailable=(Away,), metrics_topic="m")
    broker.away = True
    outlet.report({"n": 1})
    outlet.dead_letter("clicks", 0, 7, b"junk", "not_json", "x")
    broker.away = False
    outlet.report({"n": 2})
    assert broker.sent == [("m", b'{"n": 2}')]
    assert [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()] == [{"n": 1}, {"n": 2}]
    with pytest.raises(BrokerError, match=r"2 times .*dead letter of clicks:0 at offset 7: nobody answers"):
        outlet.flush()


def test_a_report_that_cannot_be_written_is_an_error_at_the_end_only(tmp_path: Path) -> None:
    (tmp_path / "reports.jsonl").mkdir()
    outlet = Outlet(tmp_path)
    outlet.report({"n": 1})
    with pytest.raises(ConfigError, match=r"reports.jsonl"):
        outlet.flush()
    Outlet(tmp_path / "fine").flush()
