"""Events of kind `example`, which come with their label, from the joiner to the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.avro import EVENT, KnownSchemas, body, confluent
from support.commands import own_topics, read_headers, succeed
from support.delta_chains import assert_chains_hold
from support.event_records import as_values
from support.joins import (
    WINDOW,
    Log,
    Poll,
    bounded,
    capacity,
    expected,
    features,
    joiner,
    logs_with_polls,
    release,
    restarted,
    rows_of,
    run,
)
from support.lineage import QUICK
from support.topics import sent
from support.trainers import Partitions, assert_equal_states, final_state, finish, trainer

from stream_ctr.evaluate.metrics import Scored, Windows
from stream_ctr.events.arrow_events import pack
from stream_ctr.events.batch import Arrivals, LabelledArrivals
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.fit import fit_numbers
from stream_ctr.events.infer import infer_fields
from stream_ctr.events.json_events import encode_clicks, encode_examples, encode_impressions
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.watermark import Watermarks
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.report_log import read_reports
from stream_ctr.train.report import Report, Waiting
from stream_ctr.train.trainer import Surroundings

MIXED = ("impression", "click", "example", "example")
T = 1_735_689_600_000
FIELDS = [Field("app", "categorical"), Field("age", "numeric")]
WRONG = (b'"label":null', b'"label":2', b'"label":0.5', b'"label":"1"')


class Flags:
    """Flags of which these are raised whenever they are asked for."""

    def __init__(self, raised: set[str]) -> None:
        self.raised = raised

    def due(self, name: str) -> bool:
        return name in self.raised


def labelled(ids: Sequence[int], time: Sequence[int], label: Sequence[int]) -> LabelledArrivals:
    n = len(ids)
    return LabelledArrivals(
        Arrivals.of(ids, time), np.array(label, np.uint8), *features(np.arange(n))
    )


# -- the joiner ----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(logs_with_polls(MIXED), st.sampled_from([3, 1 << 16]))
def test_examples_leave_in_one_order_with_the_joined_ones_however_polls_interleave(
    case: tuple[Log, list[Poll]], at_most: int
) -> None:
    log, polls = case
    parts, target, _ = run(log, polls, at_most=at_most)
    rows = rows_of(parts)
    assert rows == [(t, p * 1000 + o, id_, label) for t, p, o, id_, label in expected(log)]
    counts = target.counts()
    given_ids = [e.id for events in log for e in events if e.kind == "example"]
    assert counts["labelled"] == len(given_ids)
    assert counts["labelled_duplicate"] == len(given_ids) - len(set(given_ids))
    shown = len(rows) - len(set(given_ids))
    assert counts["impressions"] == shown + sum(
        counts[f"impressions_{fate}"] for fate in ("late", "duplicate")
    )


@settings(max_examples=60, deadline=None)
@given(logs_with_polls(MIXED))
def test_a_restart_from_the_state_after_any_poll_changes_nothing(
    case: tuple[Log, list[Poll]],
) -> None:
    log, polls = case
    straight, straight_joiner, _ = run(log, polls)
    resumed, resumed_joiner, _ = run(log, polls, restart=True)
    assert rows_of(straight) == rows_of(resumed)
    assert straight_joiner.counts() == resumed_joiner.counts()


@settings(max_examples=40, deadline=None)
@given(logs_with_polls(MIXED), st.booleans())
def test_spilling_changes_neither_examples_nor_order(
    case: tuple[Log, list[Poll]], restart: bool
) -> None:
    log, polls = case
    with capacity(segment_rows=4, features=8):
        parts, _, _ = run(log, polls, restart=restart)
    assert rows_of(parts) == [
        (t, p * 1000 + o, id_, label) for t, p, o, id_, label in expected(log)
    ]


def test_an_example_leaves_when_the_watermark_has_passed_its_time() -> None:
    target = joiner()
    target.push_labelled(labelled([7], [1000], [1]))
    assert len(target.advance(1000)) == 0
    examples = target.advance(1001)
    assert (examples.time.tolist(), examples.label.tolist()) == ([1000], [1])
    assert target.pending == 0


def test_an_example_behind_the_watermark_leaves_as_soon_as_it_moves_on_and_is_counted() -> None:
    target = joiner()
    target.advance(2000)
    late = labelled([7, 8], [1000, 2500], [1, 0])
    target.push_labelled(late, limit=np.array([2000, 2000]))
    assert target.advance(2001).time.tolist() == [1000]
    assert target.counts()["labelled_late"] == 1


def test_no_click_finds_an_example_and_no_impression_is_its_duplicate() -> None:
    target = LabelJoiner(fields=39, value_fields=1, label_window_ms=WINDOW)
    target.push_clicks(Arrivals.of([7], [1000]))
    target.push_labelled(labelled([7], [1000], [0]))
    target.push_clicks(Arrivals.of([7], [1010]))
    target.push_impressions(Arrivals.of([7], [1005]), *features(np.arange(1)))
    examples = target.drain()
    assert examples.time.tolist() == [1000, 1005]
    assert examples.label.tolist() == [0, 1]
    assert target.counts()["impressions_duplicate"] == 0


def test_an_id_is_new_again_beyond_the_duplicate_horizon() -> None:
    def short_memory() -> LabelJoiner:
        return LabelJoiner(
            fields=39, value_fields=1, label_window_ms=WINDOW, duplicate_horizon_ms=500
        )

    target = short_memory()
    target.push_labelled(labelled([7], [1000], [0]))
    target.advance(1100)
    for time, duplicates in ((1500, 1), (1501, 1)):
        # The index has moved the entry of the example through a snapshot, too.
        target = restarted(
            target,
            LabelJoiner(
                fields=39, value_fields=1, label_window_ms=WINDOW, duplicate_horizon_ms=500
            ),
        )
        target.push_labelled(labelled([7], [time], [0]))
        assert target.counts()["labelled_duplicate"] == duplicates


def test_the_horizon_of_a_pending_example_survives_a_restart() -> None:
    def short_memory() -> LabelJoiner:
        return LabelJoiner(
            fields=39, value_fields=1, label_window_ms=WINDOW, duplicate_horizon_ms=500
        )

    target = short_memory()
    target.push_labelled(labelled([7], [1000], [0]))
    target = restarted(target, short_memory())
    target.push_labelled(labelled([7], [1000 + 500 - WINDOW // 2], [0]))
    assert target.counts()["labelled_duplicate"] == 1


def test_a_full_joiner_evicts_examples_and_counts_them_apart() -> None:
    target = bounded(1 << 20, over_bound="evict")
    n = 4000
    for first in range(0, n, 500):
        ids = list(range(first, first + 500))
        target.push_labelled(labelled(ids, ids, [1] * 500))
    evicted = target.counts()["labelled_evicted"]
    assert evicted > 0
    assert target.counts()["impressions_evicted"] == 0
    assert target.counts()["clicks_joined"] == 0
    assert sum(map(len, release(target.drain))) == n - evicted


# -- the model -----------------------------------------------------------------------------------


def example_stream(n: int, *, first: int = 0) -> pa.LargeBinaryArray:
    rng = np.random.default_rng(first)
    time = T + np.arange(first, first + n) * 100
    columns = {
        "app": pa.array([f"a{k}" for k in rng.integers(0, 20, n)]),
        "age": pa.array(rng.random(n) * 50),
    }
    label = pa.array(rng.integers(0, 2, n))
    return encode_examples(pa.array(np.arange(first, first + n)), time, label, columns)


def mixed_stream(n: int) -> pa.LargeBinaryArray:
    """Return n events in order of time: impressions, their clicks, and examples."""
    rng = np.random.default_rng(5)
    time = T + np.arange(n) * 300
    columns = {"app": pa.array([f"a{k}" for k in rng.integers(0, 20, n)])}
    ids = pa.array(np.arange(n))
    shown = encode_impressions(ids, time, columns)
    clicked = np.flatnonzero(rng.random(n) < 0.3)
    clicks = encode_clicks(ids.take(pa.array(clicked)), time[clicked] + 2000)
    given_examples = encode_examples(ids, time, pa.array(rng.integers(0, 2, n)), columns)
    order = np.argsort(np.concatenate([time, time[clicked] + 2000, time]), kind="stable")
    return pa.concat_arrays([shown, clicks, given_examples]).take(pa.array(order))


def test_examples_alone_are_learned_in_the_order_of_the_log(tmp_path: Path) -> None:
    values = example_stream(1000)
    source = Partitions([values])
    built = trainer(tmp_path, source, fields=FIELDS)
    learned: list[int] = []
    learn = built.state.learn

    def record(batch, timer):  # type: ignore[no-untyped-def]
        learned.extend(batch.time.tolist())
        return learn(batch, timer)

    built.state.learn = record  # type: ignore[method-assign]
    report = finish(built)
    assert learned == (T + np.arange(1000) * 100).tolist()
    assert report["examples"] == 1000
    assert report["counters"]["labelled"] == 1000
    assert report["events"] == 1000


@pytest.mark.parametrize("stop_after", [1, 400, 999])
@pytest.mark.parametrize("make", [example_stream, mixed_stream])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_model(
    make: Callable[[int], pa.LargeBinaryArray], stop_after: int, tmp_path: Path
) -> None:
    values = make(1000)
    straight = tmp_path / "straight"
    finish(trainer(straight, Partitions([values]), fields=FIELDS))
    stopped = tmp_path / "stopped"
    finish(trainer(stopped, Partitions([values], seed=1, stop_after=stop_after), fields=FIELDS))
    again = trainer(stopped, Partitions([values], seed=2), fields=FIELDS)
    newest = snapshot.newest(stopped / "snapshots")
    assert newest
    again.restore(newest)
    finish(again)
    assert_equal_states(straight, stopped)


def test_partitions_polled_in_any_order_give_the_same_model(tmp_path: Path) -> None:
    values = mixed_stream(1500)
    parts = [values.take(pa.array(np.arange(len(values))[p::3])) for p in range(3)]
    states = []
    for seed in (1, 2):
        directory = tmp_path / str(seed)
        finish(trainer(directory, Partitions(parts, seed=seed), fields=FIELDS))
        states.append(final_state(directory)["model"])
    for name, tensor in states[0].items():
        assert np.array_equal(tensor, states[1][name]), name


def windows_of(directory: Path) -> dict[int, int]:
    """Return how many examples each window had when it was reported as final, by its start."""
    lines = map(json.loads, (directory / "reports.jsonl").read_text().splitlines())
    windows = [line for line in lines if line["kind"] == "window"]
    assert len({line["start_ms"] for line in windows}) == len(windows)
    return {line["start_ms"]: line["models"]["deepfm"]["count"] for line in windows}


@pytest.mark.parametrize("window", ["30s", "60s"])
def test_a_window_is_final_when_the_impressions_beside_its_examples_are_learned(
    window: str, tmp_path: Path
) -> None:
    n = 1500
    source = Partitions([mixed_stream(n)], largest=60)
    finish(trainer(tmp_path, source, fields=FIELDS, metrics={"window": window}))
    found = windows_of(tmp_path)
    window_ms = 1000 * int(window[:-1])
    times = T + np.arange(n) * 300
    starts = times // window_ms * window_ms
    # An impression and an example at each of these times; the last window is still open.
    assert found == {
        int(start): 2 * int((starts == start).sum()) for start in np.unique(starts)[:-1]
    }


def test_windows_of_examples_alone_are_final_up_to_the_end_of_their_log(tmp_path: Path) -> None:
    finish(trainer(tmp_path, Partitions([example_stream(1500)]), fields=FIELDS))
    first = T // 60_000 * 60_000
    assert windows_of(tmp_path) == {first: 600, first + 60_000: 600}


def test_examples_that_come_out_of_order_are_in_the_window_of_their_time(tmp_path: Path) -> None:
    values = example_stream(1500)
    behind = np.arange(1500) + np.where(np.arange(1500) % 4 == 0, 550, 0)  # by 55 s
    late = values.take(pa.array(np.argsort(behind, kind="stable")))
    report = finish(trainer(tmp_path, Partitions([late], largest=60), fields=FIELDS))
    assert report["counters"]["labelled_late"] > 200  # join.allowed_lateness is 30 s
    first = T // 60_000 * 60_000
    assert windows_of(tmp_path) == {first: 600, first + 60_000: 600}


def test_examples_alone_raise_no_alarm_and_count_no_click(tmp_path: Path) -> None:
    report = finish(trainer(tmp_path, Partitions([example_stream(1000)]), fields=FIELDS))
    assert report["alarms"] == report["stalled"] == report["refused"] == []
    assert report["stalls"] == report["pending"] == 0
    assert report["click_coverage"] is None
    assert not [name for name in report["counters"] if "click" in name and report["counters"][name]]


def test_a_run_that_waits_names_the_examples_among_what_is_pending(tmp_path: Path) -> None:
    seen: list[Report] = []
    around = Surroundings(show=seen.append, flags=Flags({"report"}))
    source = Partitions([mixed_stream(40)], largest=10, stop_after=40)
    finish(trainer(tmp_path, source, fields=FIELDS, surroundings=around))
    waiting = [report for report in seen if report.pending]
    assert waiting
    assert isinstance(waiting[-1].waiting, Waiting)
    assert waiting[-1].waiting.labelled == waiting[-1].pending // 2


def test_base_and_deltas_of_examples_give_the_next_snapshot(tmp_path: Path) -> None:
    flags = Flags({"delta"})
    built = trainer(
        tmp_path,
        Partitions([example_stream(4000)], largest=200),
        fields=FIELDS,
        surroundings=Surroundings(flags=flags),
        schedule={"snapshot_examples": 1500},
        snapshots={"keep": 50, "delta_every": "1s", "gate_clicks": 0},
    )
    report = finish(built)
    assert report["deltas"]["written"] > 2
    assert report["deltas"]["failed"] == report["deltas"]["refused"] == 0
    assert assert_chains_hold(tmp_path)


@pytest.mark.slow
def test_a_topic_of_examples_is_read_to_its_end_and_its_bad_ones_are_dead_letters(
    embedded_broker: str, topic: str, tmp_path: Path
) -> None:
    good = example_stream(1200).to_pylist()
    bad = [good[0].replace(b'"label":%d' % label, other) for label in (0, 1) for other in WRONG]
    bad = [record for record in bad if record != good[0]]
    run = ("run", "--topic", topic, "--bootstrap-servers", embedded_broker, "--until-end")
    run += ("--state", tmp_path / "state", *QUICK, *own_topics(topic))
    sent(embedded_broker, topic, pa.array([*good[:700], *bad], pa.large_binary()))
    first = succeed(*run)
    sent(embedded_broker, topic, pa.array(good[700:], pa.large_binary()))
    second = succeed(*run)
    assert "click" not in first.output + second.output
    *_, report = read_reports(tmp_path / "state")
    assert report["examples"] == report["counters"]["labelled"] == 1200
    assert report["lag"] == report["pending"] == 0
    reasons = ["missing_label", "wrong_label", "wrong_type"]
    assert [report["counters"][f"rejected.{reason}"] for reason in reasons] == [1, 2, 1]
    letters = read_headers(embedded_broker, f"{topic}.dlq")
    assert sorted(headers["__stream_ctr.errors.reason"].decode() for _, headers in letters) == [
        "missing_label",
        *["wrong_label"] * 2,
        "wrong_type",
    ]
    assert {value for value, _ in letters} == set(bad)


# -- the rooms between ---------------------------------------------------------------------------


def test_examples_in_arrow_and_integer_ids_are_those_of_json() -> None:
    records = example_stream(50)
    plain = as_values(Decoder(FIELDS).decode(records))
    packed = as_values(Decoder(FIELDS).decode(pack(records, events_a_record=20)))
    assert [(id, time, label) for _, id, time, label in plain["examples"]] == [
        (id, time, label) for _, id, time, label in packed["examples"]
    ]
    assert plain["features_of_examples"] == packed["features_of_examples"]
    assert plain["examples"][3][1] == "3"


@pytest.mark.parametrize(
    ("label", "kept", "reason"),
    [
        (pa.array([0, 1]), 2, None),
        (pa.array([True, False]), 2, None),
        (pa.array([1.0, 0.0]), 2, None),
        (pa.array([1, None]), 1, "missing_label"),
        (pa.array([0, 2]), 1, "wrong_label"),
        (pa.array(["0", "1"]), 0, "wrong_type"),
    ],
)
def test_labels_of_an_arrow_record(label: pa.Array, kept: int, reason: str | None) -> None:
    table = pa.table(
        {
            "kind": ["example"] * 2,
            "impression_id": pa.array([1, 2]),
            "time": [T, T],
            "label": label,
            "features": [{"app": "maps"}] * 2,
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    record = pa.array([sink.getvalue().to_pybytes()], pa.large_binary())
    events, rejections = Decoder(FIELDS).decode(record)
    assert len(events.examples) == kept
    assert set(rejections.reason) == ({reason} if reason else set())


@pytest.mark.parametrize(
    ("kind", "label", "reason"),
    [
        ("int", 1, None),
        ("boolean", True, None),
        ("double", 1.0, None),
        (["null", "int"], 0, None),
        (["null", "int"], None, "missing_label"),
        ("long", 2, "wrong_label"),
        ("double", 0.5, "wrong_label"),
        ("string", "1", "wrong_type"),
    ],
)
def test_labels_of_an_avro_record(kind: object, label: object, reason: str | None) -> None:
    schema = {**EVENT, "fields": [*EVENT["fields"]]}
    (at,) = (i for i, field in enumerate(schema["fields"]) if field["name"] == "label")
    schema["fields"][at] = {"name": "label", "type": kind}
    event = {"kind": "example", "impression_id": 7, "time": T, "features": {"app": "a", "age": 1.0}}
    records = [confluent(0, body(schema, {**event, "label": label}))]
    decoder = Decoder(FIELDS, schemas=KnownSchemas(schema))
    read = as_values(decoder.decode(pa.array(records, pa.large_binary())))
    assert [row[1:] for row in read["examples"]] == ([] if reason else [("7", T, label)])
    assert [row[1] for row in read["rejects"]] == ([reason] if reason else [])


def test_an_avro_schema_without_a_label_has_no_examples() -> None:
    schema = {**EVENT, "fields": [f for f in EVENT["fields"] if f["name"] != "label"]}
    event = {"kind": "example", "impression_id": 7, "time": T, "features": {"app": "a", "age": 1.0}}
    decoder = Decoder(FIELDS, schemas=KnownSchemas(schema))
    record = confluent(0, body(schema, event))
    _, rejections = decoder.decode(pa.array([record], pa.large_binary()))
    assert rejections.reason == ["missing_label"]


@pytest.mark.parametrize(
    ("label", "reason"), [(1, None), (True, None), (None, "missing_label"), (3, "wrong_label")]
)
def test_labels_of_a_cloud_event(label: object, reason: str | None) -> None:
    event = {"kind": "example", "impression_id": "a", "time": T, "label": label, "features": {}}
    envelope = {"specversion": "1.0", "id": "e", "source": "/ads", "type": "shown", "data": event}
    record = json.dumps(envelope).encode()
    events, rejections = Decoder(FIELDS).decode(pa.array([record], pa.large_binary()))
    assert list(rejections.reason) == ([reason] if reason else [])
    assert events.label.tolist() == ([] if reason else [1])


def test_a_label_of_another_event_is_not_read_and_counts_as_an_unknown_member() -> None:
    labelled_impression = (
        b'{"kind":"impression","impression_id":"a","time":1735689600000,"label":%s,"features":{}}'
    )
    records = [labelled_impression % label for label in (b"1", b"true", b'"yes"', b"null")]
    events, rejections = Decoder(FIELDS).decode(pa.array(records, pa.large_binary()))
    assert (len(events.impressions), len(rejections)) == (4, 0)
    assert events.with_unknown_fields == 3


def test_fields_are_inferred_and_fitted_from_examples_as_from_impressions() -> None:
    records = example_stream(300)
    assert infer_fields(records) == tuple(FIELDS)
    shown = [record.replace(b'"example"', b'"impression"') for record in records.to_pylist()]
    fields = [Field("age", "numeric")]
    mixed = pa.array([*shown[:150], *records.to_pylist()[150:]], pa.large_binary())
    expected = fit_numbers([pa.array(shown, pa.large_binary())], fields, most=200)
    for found in (records, mixed):
        assert fit_numbers([found], fields, most=200) == expected


def test_examples_without_clicks_do_not_stall_a_partition() -> None:
    marks = Watermarks(partitions=1, lateness_ms=0, stall_clicks=5.0)
    n = 2000
    click = np.arange(n) % 10 == 0
    marks.observe(np.zeros(n, np.int32), np.arange(n), click)
    marks.observe(np.zeros(n, np.int32), n + np.arange(n), labelled=np.ones(n, np.bool_))
    assert not marks.stalled[0]
    marks.observe(np.zeros(n, np.int32), 2 * n + np.arange(n))
    assert marks.stalled[0]


def test_metrics_do_not_depend_on_the_order_of_the_examples_of_a_batch() -> None:
    rng = np.random.default_rng(0)
    n = 400
    time = np.arange(n) * 10
    labels = rng.integers(0, 2, n).astype(np.uint8)
    logits = rng.normal(size=n)

    def summary(rows: npt.NDArray[np.int64]) -> list[tuple[int, float | None, float | None]]:
        windows = Windows(["m"], window_ms=1000, rolling=10)
        truth = np.full(n, np.nan)
        windows.add(Scored(time[rows], labels[rows], truth, {"m": logits[rows]}, {}))
        found = windows.close(4000)
        return [(each.start_ms, each.models["m"].auc, each.models["m"].logloss) for each in found]

    in_order = summary(np.arange(n))
    assert len(in_order) == 4
    for expected_window, window in zip(in_order, summary(rng.permutation(n)), strict=True):
        assert window == pytest.approx(expected_window)
