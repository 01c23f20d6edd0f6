"""The decoder: what is an event, what is not, and that a bad record does not harm the others."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from support.event_records import FIELDS, GOOD, T, features, record
from support.reliability import Outcome

from stream_ctr.events.arrow_events import pack
from stream_ctr.events.decoder import Decoder, Rejections
from stream_ctr.events.parsed_events import ParsedEvents, Rejection


@pytest.mark.parametrize(
    ("value", "app", "age"),
    [
        (features(app=5), "5", 31.0),
        (features(app=-(2**63)), str(-(2**63)), 31.0),
        (features(app=True), "true", 31.0),
        (features(app=None, age=None), None, None),
        (record(features={}), None, None),
        (features(extra={"deep": [1]}), "maps", 31.0),
        (b" " + GOOD + b"\n", "maps", 31.0),
        (json.dumps(json.loads(GOOD), indent=2).encode(), "maps", 31.0),
        # Of members of one name, the last counts.
        (GOOD.replace(b'"age":31', b'"age":1,"age":31'), "maps", 31.0),
        (GOOD[:-1] + b',"x":' + b"[" * 200 + b"]" * 200 + b"}", "maps", 31.0),
        (record(extra="[" * 1000), "maps", 31.0),
        (GOOD.replace(b"maps", b"m\\u0000\\u00e9"), "m\0é", 31.0),
    ],
)
def test_unusual_but_good_records_are_read(
    value: bytes, app: str | None, age: float | None
) -> None:
    for values in ([value], [GOOD, value, GOOD]):
        events, rejections = Decoder(FIELDS).decode(pa.array(values, pa.large_binary()))
        assert len(rejections) == 0
        index = len(values) // 2
        assert events.impressions.features["app"][index].as_py() == app
        assert events.impressions.features["age"][index].as_py() == age


def test_events_of_both_formats_come_in_order_of_records_and_of_events_in_a_record() -> None:
    packed = pack(pa.array([GOOD] * 3, pa.large_binary()), events_a_record=3)[0].as_py()
    unusual = GOOD.replace(b'"age":31', b'"age":1,"age":31')  # which only the strict parser reads
    values = pa.array([unusual, packed, GOOD, b"oops", packed, unusual], pa.large_binary())
    events, rejections = Decoder(FIELDS).decode(values)
    assert events.impressions.row.tolist() == [0, 1, 1, 1, 2, 4, 4, 4, 5]
    assert events.impressions.within.tolist() == [0, 0, 1, 2, 0, 0, 1, 2, 0]
    assert (rejections.row.tolist(), rejections.within.tolist()) == ([3], [0])


def test_an_event_is_rejected_for_the_first_rule_that_it_breaks() -> None:
    broken: dict[str, object] = {
        "kind": "view",
        "impression_id": "",
        "time": None,
        "features": None,
        "true_probability": 2,
    }
    mended: dict[str, object] = {
        "kind": "impression",
        "impression_id": "a",
        "time": T + 1,
        "features": {},
        "true_probability": 0.5,
    }
    received = np.array([T])
    decoder = Decoder(FIELDS, max_ahead_ms=0)
    reasons = []
    while True:
        values = pa.array([record(**broken)], pa.large_binary())
        _, rejections = decoder.decode(values, received)
        if not len(rejections):
            break
        reasons += rejections.reason
        if reasons[-1] == "time_in_future":
            received = np.array([-1])  # unknown
        else:
            name = next(name for name in mended if broken[name] != mended[name])
            broken[name] = 5 if reasons[-1] == "missing_time" else mended[name]
    assert reasons == [
        "unknown_kind",
        "missing_id",
        "missing_time",
        "time_out_of_range",
        "time_in_future",
        "missing_features",
        "wrong_probability",
    ]


def test_rejections_are_columns_in_order_of_records_and_of_events_in_a_record() -> None:
    rejections = Rejections.of(
        [Rejection(2, "c", "C"), Rejection(1, "b", "B", 5, b"y"), Rejection(1, "a", "A", 3, b"x")]
    )
    assert rejections.row.tolist() == [1, 1, 2]
    assert rejections.within.tolist() == [3, 5, 0]
    assert rejections.reason == ["a", "b", "c"]
    assert rejections.message == ["A", "B", "C"]
    assert rejections.value == [b"x", b"y", None]
    assert len(Rejections.of([])) == 0


POISON = record(impression_id="poison")


@pytest.mark.bad_input("a record that makes a decoder raise", via="records")
@pytest.mark.parametrize("around", [[], [GOOD], [GOOD, b"oops", GOOD]])
@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError, RecursionError, KeyError])
def test_a_record_for_which_a_reader_raises_is_one_rejection_and_harms_no_other(
    error: type[Exception],
    around: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
) -> None:
    concatenate = ParsedEvents.concatenate

    def defective(parts: Sequence[ParsedEvents]) -> ParsedEvents:
        events = concatenate(parts)
        if "poison" in events.impression_id.to_pylist():
            raise error("a defect\n")
        return events

    monkeypatch.setattr(ParsedEvents, "concatenate", defective)
    arrow = pack(pa.array([POISON, GOOD], pa.large_binary()), events_a_record=2)[0].as_py()
    values = pa.array([*around, POISON, *around, arrow, *around], pa.large_binary())
    times = np.arange(len(values)) + T
    events, rejections = Decoder(FIELDS).decode(values, times)
    poisoned = [len(around), 2 * len(around) + 1]
    rejected = {
        row: (reason, message)
        for row, reason, message in zip(
            rejections.row.tolist(), rejections.reason, rejections.message, strict=True
        )
        if reason != "not_json"
    }
    assert list(rejected) == poisoned
    for reason, message in rejected.values():
        assert reason == "undecodable"
        assert message.startswith(f"the decoder raised {error.__name__} (decoder.py:")
        assert message.isprintable()
    good = [row for row, value in enumerate(values.to_pylist()) if value == GOOD]
    assert events.impressions.row.tolist() == good
    assert rejections.row.tolist() == sorted({*range(len(values))} - {*good})
    outcome("dead letter: undecodable, with the class of the error")


def test_a_lack_of_memory_is_no_fault_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ParsedEvents, "concatenate", fail)
    with pytest.raises(MemoryError):
        Decoder(FIELDS).decode(pa.array([GOOD], pa.large_binary()))
