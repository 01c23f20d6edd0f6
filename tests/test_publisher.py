"""What cannot be written or sent now does not stop learning, and is not forgotten."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.processes import in_child

from stream_ctr.errors import BrokerError, ConfigError
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.publisher import Publisher


class Away(Exception):
    pass


class Broker:
    """A sink whose broker can go away."""

    def __init__(self) -> None:
        self.away = False
        self.sent: list[tuple[str, bytes]] = []
        self.headers: list[Sequence[tuple[str, bytes]]] = []
        self.keys: list[bytes | None] = []

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        self.flush(0)
        self.sent.append((topic, value))
        self.headers.append(headers)
        self.keys.append(key)

    def flush(self, timeout_seconds: float) -> None:
        if self.away:
            raise Away("nobody answers")


def letters(directory: Path) -> list[str]:
    path = directory / "dead_letters.jsonl"
    return (
        [json.loads(line)["offset"] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def test_a_broker_that_is_away_loses_no_report_and_no_letter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker, unavailable=(Away,), metrics_topic="m")
    publisher.dead_letter(
        "clicks", 0, 5, b"junk", "not_json", "x"
    )  # sent, but not known to have arrived
    broker.away = True
    publisher.report({"n": 1})
    publisher.dead_letter("clicks", 0, 7, b"junk", "not_json", "x")
    broker.away = False
    publisher.dead_letter("clicks", 0, 9, b"junk", "not_json", "x")
    publisher.report({"n": 2})
    assert [topic for topic, _ in broker.sent] == ["clicks.dlq", "clicks.dlq", "m"]
    assert [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()] == [
        {"n": 1},
        {"n": 2},
    ]
    publisher.flush()
    assert letters(tmp_path) == ["5", "7"]
    assert "2 dead letters that no broker took are in" in caplog.text


def test_letters_that_do_not_arrive_before_a_snapshot_are_in_the_file_by_then(
    tmp_path: Path,
) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker, unavailable=(Away,))
    publisher.dead_letter("clicks", 0, 5, b"junk", "not_json", "x")
    broker.away = True
    publisher.deliver_dead_letters()
    assert letters(tmp_path) == ["5"]


def test_a_letter_that_no_broker_would_take_is_cut_and_says_so(tmp_path: Path) -> None:
    broker = Broker()
    Publisher(tmp_path, sink=broker).dead_letter("clicks", 0, 5, b"x" * 2_000_000, "too_large", "x")
    assert [len(value) for _, value in broker.sent] == [900_000]
    assert dict(broker.headers[-1])["__stream_ctr.errors.cut_to"] == b"900000"


def test_the_letters_of_one_record_have_keys_of_their_own_and_name_their_event(
    tmp_path: Path,
) -> None:
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker)
    for event in (None, 0, 7):
        publisher.dead_letter("clicks", 2, 5, b"x", "missing_id", "x", event=event)
    assert broker.keys == [b"clicks-2-5", b"clicks-2-5-0", b"clicks-2-5-7"]
    assert [dict(headers).get("__stream_ctr.errors.event") for headers in broker.headers] == [
        None,
        b"0",
        b"7",
    ]


def test_a_pointer_that_does_not_reach_its_topic_is_sent_again_at_the_end_or_that_is_an_error(
    tmp_path: Path,
) -> None:
    told = {
        "model": "m",
        "epoch": 1,
        "sequence": 1,
        "examples": 1,
        "event_time_ms": 0,
        "created_ms": 0,
    }
    path = snapshot.write(
        tmp_path / "snapshots", tensors={}, manifest=told, snapshot_id=snapshot.new_id(1, 0)
    )
    broker = Broker()
    publisher = Publisher(tmp_path, sink=broker, unavailable=(Away,), snapshot_topic="s")
    broker.away = True
    publisher.publish(path, told)
    with pytest.raises(
        BrokerError, match="the pointer to snapshot 00000001-.* did not reach topic 's'"
    ):
        publisher.flush()
    broker.away = False
    publisher.flush()
    assert [topic for topic, _ in broker.sent] == ["s"]


def test_a_report_that_cannot_be_written_is_an_error_at_the_end_only(tmp_path: Path) -> None:
    (tmp_path / "reports.jsonl").mkdir()
    publisher = Publisher(tmp_path)
    publisher.report({"n": 1})
    with pytest.raises(ConfigError, match=r"reports.jsonl"):
        publisher.flush()
    Publisher(tmp_path / "fine").flush()


def test_a_report_for_which_there_is_no_room_spoils_no_other(tmp_path: Path) -> None:
    def report() -> None:
        publisher = Publisher(tmp_path)
        publisher.report({"n": 1})
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (20_000, most)
        )  # a longer file fails to grow, as on a full disk
        publisher.report({"n": 2, "long": "x" * 50_000})
        publisher.report({"n": 3})
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        publisher.report({"n": 4, "long": "x" * 50_000})

    (tmp_path / "reports.jsonl").write_text('{"n": 0}\n{"n": ')  # a crash has left half a line
    assert in_child(report) == 0
    first, half, *others = (tmp_path / "reports.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in (first, *others)] == [0, 1, 3, 4]
    assert half == '{"n": '
