"""Everything that may come instead of an event.

It is kept with its reason, counted and never trained, and it does not harm the records around it.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from safetensors.numpy import load, save
from support.commands import command, own_topics, read_headers, succeed
from support.event_records import EVENTS, FIELDS, GOOD, T, as_values, features, record
from support.fuzzing import StrictDecoder, ipc
from support.learners import learner, random_batch
from support.lineage import SMALL, Fingerprint, last_report, newest
from support.manifests import replace_file
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome
from support.sample_logs import AVAZU_HEADER, COLUMNS, OBD, avazu_line, criteo_line, nested

from stream_ctr import Scorer
from stream_ctr.connectors import kafka
from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import LARGEST_UNSCALED_MULTIPLIER, Hasher
from stream_ctr.events.field import Field
from stream_ctr.logs.open import open_log
from stream_ctr.models import MODELS

# By the name of a row of the table in docs/reliability.md: cases, each a value and its reason.
ITEMS: dict[str, dict[str, tuple[bytes | None, str]]] = {
    "empty value": {"no bytes": (b"", "empty"), "white space": (b"  \n ", "empty")},
    "tombstone": {"null": (None, "tombstone")},
    "not JSON, truncated, trailing bytes": {
        "text": (b"oops", "not_json"),
        "truncated": (GOOD[:-5], "not_json"),
        "trailing bytes": (GOOD + b" x", "not_json"),
        "two documents": (GOOD + GOOD, "not_json"),
        "two lines": (GOOD + b"\n" + GOOD, "not_json"),
        "a comma too many": (GOOD[:-1] + b",}", "not_json"),
    },
    "BOM, invalid UTF-8, lone surrogate": {
        "byte order mark": (b"\xef\xbb\xbf" + GOOD, "not_json"),
        "invalid UTF-8": (GOOD.replace(b"maps", b"\xff\xfe"), "not_json"),
        "invalid UTF-8 in an unknown member": (GOOD[:-1] + b',"x":"\xff"}', "not_json"),
        "lone surrogate": (GOOD.replace(b"maps", b"\\ud800"), "not_json"),
        "control character": (GOOD.replace(b"maps", b"m\x01"), "not_json"),
    },
    "NaN, Infinity, 1e999": {
        "NaN": (GOOD.replace(b"31", b"NaN"), "not_json"),
        "Infinity": (GOOD.replace(b"31", b"Infinity"), "not_json"),
        "1e999": (GOOD.replace(b"31", b"1e999"), "not_json"),
        "NaN as probability": (GOOD[:-1] + b',"true_probability":NaN}', "not_json"),
        "-Infinity in an unknown member": (GOOD[:-1] + b',"x":-Infinity}', "not_json"),
    },
    "integer beyond 2^63": {
        "as time": (record(time=2**63), "wrong_time"),
        "as category": (features(app=2**63), "wrong_type"),
        "of 400 digits as number": (GOOD.replace(b"31", b"9" * 400), "wrong_type"),
        "of 5,000 digits in an unknown member": (
            GOOD[:-1] + b',"x":' + b"9" * 5000 + b"}",
            "not_json",
        ),
    },
    "true for a number, text for a number": {
        "true": (features(age=True), "wrong_type"),
        "text": (features(age="31"), "wrong_type"),
        "a fraction for a category": (features(app=1.5), "wrong_type"),
        "a list for a category": (features(app=["maps"]), "wrong_type"),
        "a probability of true": (record(true_probability=True), "wrong_type"),
        "a probability of 2": (record(true_probability=2), "wrong_probability"),
    },
    "nesting 100,000 deep": {
        "100,000": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
        "300 in a good record": (GOOD[:-1] + b',"x":' + b"[" * 300 + b"]" * 300 + b"}", "too_deep"),
    },
    "top level null, list, text": {
        "null": (b"null", "not_an_object"),
        "a list": (b"[1]", "not_an_object"),
        "text": (b'"x"', "not_an_object"),
    },
    "missing id, time, kind or features": {
        "no id": (record(impression_id=...), "missing_id"),
        "an empty id": (record(impression_id=""), "missing_id"),
        "a fraction as id": (record(impression_id=5.5), "wrong_type"),
        "true as id": (record(impression_id=True), "wrong_type"),
        "an example without a label": (record(kind="example"), "missing_label"),
        "an example with the label 2": (record(kind="example", label=2), "wrong_label"),
        "an example with the label 0.5": (record(kind="example", label=0.5), "wrong_label"),
        "an example with a text as label": (record(kind="example", label="1"), "wrong_type"),
        "an example without features": (
            record(kind="example", label=1, features=...),
            "missing_features",
        ),
        "no time": (record(time=...), "missing_time"),
        "no kind": (record(kind=...), "unknown_kind"),
        "another kind": (record(kind="view"), "unknown_kind"),
        "a number as kind": (record(kind=3), "wrong_type"),
        "no features": (record(features=...), "missing_features"),
        "null features": (record(features=None), "missing_features"),
        "features a list": (record(features=[1]), "wrong_type"),
    },
    "a 10 MB value": {
        "text": (features(app="m" * 10_000_000), "too_large"),
        "spaces": (GOOD + b" " * 10_000_000, "too_large"),
    },
    "time 0, negative, far future, text": {
        "0": (record(time=0), "time_out_of_range"),
        "negative": (record(time=-T), "time_out_of_range"),
        "of 2001 in a unit of hours": (record(time=T // 3_600_000), "time_out_of_range"),
        "beyond 64 bits": (record(time=T * 10**9), "wrong_time"),
        "true": (record(time=True), "wrong_time"),
        "a word": (record(time="yesterday"), "wrong_time"),
        "without zone": (record(time="2025-01-01T00:00:00"), "wrong_time"),
    },
    "CR/LF, ANSI escapes, 1 MB of garbage in an id": {
        "steering a terminal": (
            b'{"kind":"\\u001b[2J\\r\\n\\u202e","impression_id":"\\u001b]0;owned\\u0007"}',
            "unknown_kind",
        ),
        "an id of 1 MB": (record(impression_id="\x1b[31m\r\n" * 150_000), "too_large"),
    },
}
BAD = {(what, name): case for what, cases in ITEMS.items() for name, case in cases.items()}

# Records that look odd and are good. True: they have a member that the decoder does not read.
MANY_FEATURES = features(**{f"{i:05d}": 1 for i in range(70_000)})
TERMINAL_ESCAPES = "CR/LF, ANSI escapes, 1 MB of garbage in an id"
ODD: dict[tuple[str, str], tuple[bytes, bool]] = {
    ("unknown extra fields", "one"): (features(extra={"deep": [1, {"a": ":"}]}), True),
    ("unknown extra fields", "at the top"): (record(server="x"), True),
    ("unknown extra fields", "null"): (record(server=None), False),
    ("100,000 features", "of two letters"): (MANY_FEATURES, True),
    ("duplicate keys", "the last wins"): (GOOD.replace(b'"age":31', b'"age":1,"age":31'), True),
    ("duplicate keys", "of the features"): (
        GOOD.replace(b'"features"', b'"features":{"app":"x"},"features"'),
        True,
    ),
    (TERMINAL_ESCAPES, "escaped in JSON"): (record(impression_id="a\r\n\x1b[2J\u202e:"), False),
    ("path-like names", "as id"): (record(impression_id="../../../etc/passwd\0"), False),
    ("not JSON, truncated, trailing bytes", "white space around"): (b" " + GOOD + b"\r\n", False),
}


def each(cases: Iterable[tuple[str, str]], via: str) -> list[Any]:
    """Return the cases, each marked as evidence for its row of the table."""
    return [
        pytest.param(*key, marks=pytest.mark.bad_input(key[0], via=via), id=f"{key[0]}: {key[1]}")
        for key in cases
    ]


def all_of(via: str) -> Callable[[Any], Any]:
    """Return a decorator that marks a test as evidence for every row of `ITEMS`."""

    def mark(test: Any) -> Any:
        for what in reversed(ITEMS):
            test = pytest.mark.bad_input(what, via=via)(test)
        return test

    return mark


# -- a record ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "name"), each(BAD, "JSON records"))
def test_a_bad_record_is_rejected_with_its_reason_and_harms_no_other(
    what: str, name: str, outcome: Outcome
) -> None:
    value, reason = BAD[what, name]
    for decoder in (Decoder(FIELDS), StrictDecoder(FIELDS)):
        for before, after in ((0, 0), (1, 1), (70, 50)):
            values = pa.array([*[GOOD] * before, value, *[GOOD] * after], pa.large_binary())
            events, rejections = decoder.decode(values)
            assert (rejections.row.tolist(), rejections.reason) == ([before], [reason])
            assert rejections.message[0].isprintable()
            assert len(rejections.message[0]) < 300
            good = [row for row in range(before + 1 + after) if row != before]
            assert events.impressions.row.tolist() == good
            assert set(events.impressions.features["app"].to_pylist()) <= {"maps"}
    outcome("counted, no dead letter" if value is None else f"dead letter: {reason}")


@pytest.mark.parametrize(("what", "name"), each(ODD, "JSON records"))
def test_an_odd_record_is_read_and_counted_if_it_has_unknown_members(
    what: str, name: str, outcome: Outcome
) -> None:
    value, has_unknown = ODD[what, name]
    for decoder in (Decoder(FIELDS), StrictDecoder(FIELDS)):
        for around in (0, 1, 60):
            values = pa.array([GOOD] * around + [value] + [GOOD] * around, pa.large_binary())
            read = as_values(decoder.decode(values))
            assert read["rejects"] == []
            assert [column[around] for column in read["features"].values()] == ["maps", 31.0]
            assert read["with_unknown_fields"] == has_unknown
    outcome("accepted, counted as fields_unknown" if has_unknown else "accepted")


def has_unknown_members(value: bytes) -> bool:
    """Return True when the record has a member that is not null and that the decoder ignores."""
    pairs = json.loads(
        value, object_pairs_hook=lambda pairs: [pair for pair in pairs if pair[1] is not None]
    )
    names = [name for name, _ in pairs]
    inner = [name for name, value in pairs if name == "features" for name, _ in value]
    known = {"kind", "impression_id", "time", "features", "true_probability"}
    return len(names) > len(set(names) & known) or len(inner) > len(set(inner) & {"app", "age"})


def test_events_with_unknown_members_are_counted_as_another_parser_counts_them() -> None:
    rng = np.random.default_rng(0)
    members = [
        ("app", "a:b"),
        ("age", 5),
        ("x", '"y":1'),
        ("z", {"q": ["a:b", {"r": None}]}),
        ("n", None),
    ]
    values = []
    for _ in range(300):
        document = json.loads(EVENTS[rng.integers(len(EVENTS))])
        if rng.random() < 0.5:
            document["features"] = {name: value for name, value in members if rng.random() < 0.4}
        values.append(json.dumps(document, indent=2 if rng.random() < 0.3 else None).encode())
    events, rejections = Decoder(FIELDS).decode(pa.array(values, pa.large_binary()))
    assert len(rejections) == 0
    assert 50 < events.with_unknown_fields == sum(map(has_unknown_members, values)) < 250


@pytest.mark.bad_input(
    "time 0, negative, far future, text",
    via="Kafka records, whose time the broker knows",
)
def test_an_event_far_ahead_of_its_record_is_rejected_if_the_record_has_a_time(
    outcome: Outcome,
) -> None:
    ahead = record(time=T + 300_001)
    values = pa.array(
        [ahead, ahead, record(time=T + 300_000), record(time=T - 10**10)], pa.large_binary()
    )
    events, rejections = Decoder(FIELDS).decode(values, np.array([T, -1, T, T]))
    assert (rejections.row.tolist(), rejections.reason) == ([0], ["time_in_future"])
    assert events.impressions.row.tolist() == [1, 2, 3]
    outcome("dead letter: time_in_future")


@pytest.mark.bad_input("a value that decompresses past the limit", via="records")
def test_a_record_over_the_size_limit_is_rejected_unread(outcome: Outcome) -> None:
    values = pa.array([GOOD, features(app="m" * 200)], pa.large_binary())
    events, rejections = Decoder(FIELDS, max_record_bytes=200).decode(values)
    assert (rejections.reason, len(events.impressions)) == (["too_large"], 1)
    outcome("dead letter: too_large")


@pytest.mark.bad_input("a number that float32 does not hold", via="features")
@pytest.mark.parametrize("encoding", ["value", "log_value", "buckets"])
def test_a_number_of_any_size_becomes_a_finite_multiplier(encoding: str, outcome: Outcome) -> None:
    numbers = pa.array([1e38, -1e38, 1e300, -1e300, 1.7976931348623157e308, 5e-324, None])
    hasher = Hasher(FIELDS[1:], table_bits=8, numeric_encoding=encoding)
    with np.errstate(all="raise", under="ignore"):
        ids, values = hasher.rows({"age": numbers})
    assert ((ids >= 0) & (ids < 256)).all()
    assert np.isfinite(values).all()
    assert (np.abs(values) <= LARGEST_UNSCALED_MULTIPLIER).all()
    assert values.shape == (7, len(hasher.value_fields))
    outcome("cut to a million")


@pytest.mark.bad_input("a number that float32 does not hold", via="every model, values unscaled")
@pytest.mark.parametrize(
    ("model", "rule"), [*((model, "online") for model in MODELS), ("deepfm", "adagrad")]
)
def test_every_model_learns_and_serves_the_largest_multipliers(
    model: str, rule: str, outcome: Outcome
) -> None:
    network = learner(
        model,
        fields=3,
        embedding_dim=4,
        hidden=[8, 8],
        table_bits=8,
        batch_size=64,
        value_fields=[0, 1],
        table_optimizer=rule,
    )
    hasher = Hasher((Field("x", "numeric"),), table_bits=8, numeric_encoding="value")
    largest = hasher.rows({"x": pa.array([1e30, -1e30])})[1].ravel()
    rng = np.random.default_rng(0)
    for seed in range(20):
        ids, labels = random_batch(64, seed=seed, rows=256)
        ids[:, :2] = [5, 9]
        values = rng.normal(size=(64, 2)).astype(np.float32)
        is_large = rng.random((64, 2)) < 0.1
        values[is_large] = rng.choice(largest, is_large.sum())
        logits = network.learn(ids, labels, values)
        assert logits is not None
        assert np.isfinite(np.asarray(logits)).all()
        assert np.isfinite(np.asarray(network.predict(ids, values))).all()
    outcome("learned and served")


# -- a whole run ---------------------------------------------------------------------------------


def good_events(impressions: int) -> list[bytes]:
    """Return impressions and clicks in time order. Impressions of maps are clicked more often."""
    rng = np.random.default_rng(7)
    events = []
    for i in range(impressions):
        time = T + 50 * i
        app = ["maps", "mail", "chat"][rng.integers(3)]
        members = {"app": app, "age": int(rng.integers(80))}
        events.append((time, record(impression_id=f"i{i}", time=time, features=members)))
        if rng.random() < (0.5 if app == "maps" else 0.1):
            events.append((time + 900, click(f"i{i}", time + 900)))
    return [value for _, value in sorted(events, key=lambda event: event[0])]


def click(identity: str, time: int) -> bytes:
    return json.dumps({"kind": "click", "impression_id": identity, "time": time}).encode()


REPEATED = 40


def duplicates() -> list[bytes]:
    """Return impressions that occurred before, with other features, and second clicks."""
    clicked = [json.loads(value) for value in good_events(500) if b"click" in value][:REPEATED]
    impressions = [
        record(impression_id=f"i{i}", time=T + 50 * i + 3, features={"app": "other", "age": 1})
        for i in range(REPEATED)
    ]
    return impressions + [click(event["impression_id"], event["time"] + 3) for event in clicked]


def interleaved(events: list[bytes], others: list[Any]) -> list[Any]:
    """Return the events with the others evenly between them."""
    step = len(events) // (len(others) + 1)
    mixed: list[Any] = []
    for i, other in enumerate(others):
        mixed += [*events[i * step : (i + 1) * step], other]
    return mixed + events[len(others) * step :]


RUN = [
    *SMALL,
    *("-X", "features.categorical=app"),
    *("-X", "features.numeric=age"),
    *("-X", "baseline.enabled=true"),
]


def learned_the_same(one: Fingerprint | None, other: Fingerprint | None) -> bool:
    assert one
    assert other
    return (
        one.examples == other.examples
        and one.ledger == other.ledger
        and one.weights_sha256 == other.weights_sha256
        and one.same(other, "model", "optimizer", "baseline", "metrics")
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Fingerprint:
    """Return the state of a run on the good events alone."""
    folder = tmp_path_factory.mktemp("clean")
    (folder / "log.jsonl").write_bytes(b"\n".join(good_events(3000)))
    succeed("run", "--source", folder / "log.jsonl", "--state", folder / "state", *RUN)
    found = newest(folder / "state")
    assert found
    assert found.examples == 3000
    return found


def assert_counted(counters: dict[str, int], bad: list[tuple[bytes | None, str]]) -> None:
    """Check the counters of rejections by reason."""
    expected = Counter(reason for _, reason in bad)
    assert {reason: counters[f"rejected.{reason}"] for reason in expected} == expected


@pytest.mark.slow
@all_of("a log of JSON lines")
@pytest.mark.bad_input("same id with other features, two clicks", via="a log of JSON lines")
@pytest.mark.bad_input("unknown extra fields", via="a log of JSON lines")
def test_a_log_with_every_bad_record_between_good_lines_teaches_the_same_as_without(
    clean: Fingerprint, tmp_path: Path, outcome: Outcome
) -> None:
    bad = [
        (value, reason)
        for value, reason in BAD.values()
        if value is not None and value.strip() and b"\n" not in value
    ]
    good = good_events(3000)
    extra = [value[:-1] + b',"server":"x"}' for value in good[:100]]
    lines = interleaved([*extra, *good[100:]], [value for value, _ in bad] + duplicates())
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join(lines))
    result = succeed("run", "--source", log, "--state", tmp_path / "state", *RUN)
    assert learned_the_same(newest(tmp_path / "state"), clean)
    counters = last_report(tmp_path / "state")["counters"]
    assert_counted(counters, list(bad))
    assert counters["rejected"] == len(bad)
    assert (counters["impressions_duplicate"], counters["clicks_duplicate"]) == (REPEATED, REPEATED)
    assert counters["fields_unknown"] == len(extra)
    text = (tmp_path / "state" / "dead_letters.jsonl").read_text()
    letters = [json.loads(line) for line in text.splitlines()]
    kept = [(base64.b64decode(letter["value_base64"]), letter["reason"]) for letter in letters]
    assert sorted(kept) == sorted(bad)
    assert "\x1b" not in result.output
    outcome(
        "counted by reason, kept with its bytes; "
        "ledger, weights, baseline, metrics equal to the log without it"
    )


@pytest.mark.slow
@all_of("a Kafka topic")
@pytest.mark.bad_input("key differs from id", via="a Kafka topic")
def test_a_topic_with_every_bad_record_between_good_ones_teaches_the_same_as_without(
    embedded_broker: str, topic: str, clean: Fingerprint, tmp_path: Path, outcome: Outcome
) -> None:
    """The keys are arbitrary: a key decides the partition of a record, not the id of its event."""
    bad = [
        (value, reason) for value, reason in BAD.values() if value is None or len(value) < 500_000
    ]
    values = interleaved(good_events(3000), [value for value, _ in bad] + duplicates())
    client = kafka.client_options(embedded_broker, {})
    kafka.ensure_topic(client, topic)
    sink = kafka.KafkaSink(client)
    keys = pa.array([f"key {i % 7}".encode() for i in range(len(values))], pa.large_binary())
    sink.send_batch(topic, pa.array(values, pa.large_binary()), keys=keys)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    source = ["--topic", topic, "--bootstrap-servers", embedded_broker, "--until-end"]
    result = succeed("run", "--state", tmp_path, *source, *own_topics(topic), *RUN)
    assert learned_the_same(newest(tmp_path), clean)
    counters = last_report(tmp_path)["counters"]
    assert_counted(counters, bad)
    assert counters["records"] == len(values)  # no offset is skipped
    letters = [
        (value or b"", headers["__stream_ctr.errors.reason"])
        for value, headers in read_headers(embedded_broker, f"{topic}.dlq")
    ]
    expected = [(value, reason.encode()) for value, reason in bad if value is not None]
    assert sorted(letters) == sorted(expected)
    assert "\x1b" not in result.output
    outcome(
        "counted by reason; on the dead-letter topic with its bytes and reason; "
        "ledger, weights, baseline, metrics equal to the clean run"
    )


@pytest.mark.bad_input("path-like names", via="fields")
@pytest.mark.parametrize("kind", ["numeric", "categorical"])
def test_the_name_of_a_field_is_harmless_in_messages(kind: Any, outcome: Outcome) -> None:
    name = "../\x1b[31m" + 300 * "x"
    values = pa.array([record(features={name: [1]})], pa.large_binary())
    _, rejections = Decoder([Field(name, kind)]).decode(values)
    assert rejections.message[0].isprintable()
    assert len(rejections.message[0]) < 300
    outcome("escaped and cut")


@pytest.mark.bad_input("path-like names", via="fields, model name, ids")
@pytest.mark.slow
def test_names_that_look_like_paths_or_steer_a_terminal_are_only_names(
    tmp_path: Path, outcome: Outcome
) -> None:
    names = {"../../x": "../../y", "/etc/passwd": "z", "\x1b[31mred": "\r\n", "nul\0": "\0"}
    values = [record(impression_id=f"../{i}", time=T + 50 * i, features=names) for i in range(300)]
    clicks = [click(f"../{i}", T + 50 * 300) for i in range(9)]
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join([*values, *clicks]))
    state = tmp_path / "a" / "b" / "state"
    name = "snapshots.model_name=../../model"
    result = succeed("run", "--source", log, "--state", state, *SMALL, "-X", name)
    assert last_report(state)["counters"]["clicks_joined"] == 9
    assert "\x1b" not in result.output
    outside = [path.name for path in tmp_path.rglob("*") if state not in (path, *path.parents)]
    assert sorted(outside) == ["a", "b", "log.jsonl"]
    outcome("names only: nothing is written outside the state directory")


# -- files ---------------------------------------------------------------------------------------

Write = Callable[[Path], object]


def parquet(table: pa.Table) -> Write:
    return lambda path: pa.parquet.write_table(table, path)


def altered(**columns: Any) -> Write:
    """Return a writer of the columns of a good file, changed, or left out where they are None."""
    table = pa.table(
        {name: values for name, values in {**COLUMNS, **columns}.items() if values is not None}
    )
    return parquet(table)


def half_a_parquet_file(path: Path) -> None:
    parquet(pa.table(COLUMNS))(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put(data: bytes | str) -> Write:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def lines(*texts: str) -> Write:
    return put("\n".join(texts))


def not_utf8(*others: bytes) -> pa.StringArray:
    """Return a column whose first text is not UTF-8."""
    return pa.array([b'\xff"', *others], pa.binary()).view(pa.string())


CRITEO = "\n".join(criteo_line(str(i % 2)) for i in range(3))
CRITEO_HEADER = "\t".join(["label", *(f"x{i}" for i in range(39))])
TRUNCATED_GZIP = gzip.compress(f"{CRITEO}\n".encode() * 300, 0)[:20_000]
OBD_WITHOUT_HEADER = b"\n".join(OBD.read_bytes().splitlines()[1:9])
AVAZU_WITHOUT_LABELS = AVAZU_HEADER.replace("click,", "") + "\n" + avazu_line(1)
APP_TWICE = pa.table([*pa.table(COLUMNS).columns, pa.nulls(7)], [*COLUMNS, "app"])
FAR_TIMES = pa.array([2**62, 0, 1, 2, 3, 4, T]).cast(pa.timestamp("us"))
FARTHEST_TIMES = pa.table({**COLUMNS, "time": pa.array([2**62] * 7, pa.timestamp("s"))})

OTHER_KIND = "file: empty, binary, of another kind"
GZIP = "file: gzip cut off or no gzip"
HEADER = "file: header row where none belongs, and none where one does"
OTHER_COLUMNS = "file: Parquet of other columns"
CUT_OFF = "file: Parquet empty or cut off"
LINE_ENDS = "file: CRLF, byte order mark, half a last line"
LABEL = "label not 0 or 1"
PARQUET_ROWS = "file: Parquet rows without id, kind or time"
ARROW_ROWS = "file: Arrow rows without id, kind or time"
PARQUET_TEXT = "file: Parquet text that is not UTF-8"

# The row of the table and the case: the name of the file, its writer, and the message with which
# `run --source` ends, with exit code 5.
REFUSED: dict[tuple[str, str], tuple[str, Write, str]] = {
    (OTHER_KIND, "empty"): ("log.jsonl", put(b""), "is empty"),
    (OTHER_KIND, "blank lines"): ("log.jsonl", put(b"\n\r\n \n"), "is empty"),
    (OTHER_KIND, "binary"): ("log.jsonl", put(bytes(range(256)) * 9), "no known log format"),
    (OTHER_KIND, "a folder"): ("log.jsonl", lambda path: path.mkdir(), "is a directory"),
    (OTHER_KIND, "a pipe"): ("log.jsonl", os.mkfifo, "is not a regular file"),
    (OTHER_KIND, "text under a Parquet name"): (
        "log.parquet",
        lines("a;b", "1;2", ""),
        "no column of kinds",
    ),
    (GZIP, "only its head"): ("log.gz", put(b"\x1f\x8b\x08\0"), "cannot read"),
    (GZIP, "of nothing"): ("log.gz", put(gzip.compress(b"")), "is empty"),
    (HEADER, "Open Bandit without"): ("log.csv", put(OBD_WITHOUT_HEADER), "no column of kinds"),
    (HEADER, "Avazu without labels"): (
        "log.csv",
        put(AVAZU_WITHOUT_LABELS),
        "has no column click",
    ),
    (OTHER_COLUMNS, "no time"): ("log.parquet", altered(time=None), "there is no column time"),
    (OTHER_COLUMNS, "time a fraction"): (
        "log.parquet",
        altered(time=[0.5] * 7),
        "time must be between 1973 and 2100, got 0.5",
    ),
    (OTHER_COLUMNS, "kind a number"): (
        "log.parquet",
        altered(kind=[1] * 7),
        "column kind is int64",
    ),
    (OTHER_COLUMNS, "probability text"): (
        "log.parquet",
        altered(true_probability=["x"] * 7),
        "true_probability must be a number, got 'x'",
    ),
    (OTHER_COLUMNS, "a feature nested"): (
        "log.parquet",
        altered(app=[[1]] * 7),
        "column app is list",
    ),
    (OTHER_COLUMNS, "a feature of bytes"): (
        "log.parquet",
        altered(app=[b"\xff"] * 7),
        "column app is binary",
    ),
    (OTHER_COLUMNS, "features text"): (
        "log.parquet",
        altered(features=["x"] * 7),
        "column features is string",
    ),
    (OTHER_COLUMNS, "a name that steers a terminal"): (
        "log.parquet",
        altered(**{"\x1b[31m": [[1]] * 7}),
        r"column \x1b[31m is list",
    ),
    (OTHER_COLUMNS, "a column twice"): (
        "log.parquet",
        parquet(APP_TWICE),
        "column app appears twice",
    ),
    (CUT_OFF, "no rows"): ("log.parquet", parquet(pa.table(COLUMNS).slice(0, 0)), "nothing in"),
    (CUT_OFF, "cut off"): ("log.parquet", half_a_parquet_file, "is not a parquet file"),
    (CUT_OFF, "all null"): ("log.parquet", altered(kind=pa.nulls(7, pa.string())), "must be"),
}


@pytest.mark.parametrize(("what", "name"), each(REFUSED, "--source"))
def test_a_file_that_is_not_a_log_ends_the_run_with_5_and_is_named(
    what: str, name: str, tmp_path: Path, outcome: Outcome
) -> None:
    file, write, message = REFUSED[what, name]
    write(tmp_path / file)
    result = command("run", "--source", tmp_path / file, "--state", tmp_path / "state", *SMALL)
    assert result.exit_code == 5, result.output
    assert str(tmp_path / file) in result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    outcome("exit 5, file and reason named")


# The row of the table and the case: the name of the file, its writer, how many events are read,
# and the note about the others.
READ: dict[tuple[str, str], tuple[str, Write, int, str]] = {
    (LINE_ENDS, "CRLF"): ("log.jsonl", put(b"\r\n".join(EVENTS)), 6, ""),
    (LINE_ENDS, "Criteo with CRLF"): ("log.tsv", put(CRITEO.replace("\n", "\r\n")), 4, ""),
    (LINE_ENDS, "byte order mark"): ("log.jsonl", put(b"\xef\xbb\xbf" + EVENTS[0]), 1, ""),
    (LINE_ENDS, "half a line"): ("log.tsv", put(CRITEO[:-40]), 3, ":3: expected 40 columns, got"),
    (GZIP, "in the middle"): (
        "log.tsv.gz",
        put(TRUNCATED_GZIP),
        81,
        "damaged here, what comes after is lost",
    ),
    (HEADER, "Criteo with one"): (
        "log.tsv",
        lines(CRITEO_HEADER, CRITEO),
        4,
        ":1: label must be 0 or 1, got 'label'",
    ),
    (HEADER, "Avazu with another one in it"): (
        "log.csv",
        lines(AVAZU_HEADER, avazu_line(1), AVAZU_HEADER, avazu_line(2)),
        2,
        ":3: hour must be YYMMDDHH, got 'hour'",
    ),
    (LABEL, "2"): (
        "log.tsv",
        lines(CRITEO, criteo_line("2")),
        4,
        ":4: label must be 0 or 1, got '2'",
    ),
    (LABEL, "nothing"): (
        "log.tsv",
        lines(CRITEO, criteo_line("")),
        4,
        ":4: label must be 0 or 1, got nothing",
    ),
    (LABEL, "steering a terminal"): (
        "log.csv",
        lines(avazu_line(1), avazu_line(2, chr(27))),
        1,
        r"got '\x1b'",
    ),
    (PARQUET_ROWS, "in columns"): (
        "log.parquet",
        parquet(pa.table(COLUMNS)),
        3,
        "4 lines cannot be read",
    ),
    (PARQUET_ROWS, "in a struct"): (
        "log.parquet",
        parquet(nested(pa.table(COLUMNS))),
        3,
        "4 lines cannot be read",
    ),
    (PARQUET_ROWS, "times out of range"): (
        "log.parquet",
        altered(time=FAR_TIMES),
        0,
        "time must be",
    ),
    (ARROW_ROWS, "times that no calendar has"): (
        "log.arrow",
        put(ipc(pa.ipc.new_file, FARTHEST_TIMES)),
        0,
        "time must be",
    ),
    (PARQUET_TEXT, "in a feature"): (
        "log.parquet",
        altered(app=not_utf8(*[b"x"] * 6)),
        2,
        "text that is not UTF-8",
    ),
    (PARQUET_TEXT, "in an id"): (
        "log.parquet",
        altered(impression_id=not_utf8(*[b"x"] * 6)),
        3,
        "text that is not UTF-8",
    ),
}


@pytest.mark.parametrize(("what", "name"), each(READ, "--source"))
def test_a_file_with_bad_rows_is_read_and_the_first_bad_row_is_named_with_its_line(
    what: str, name: str, tmp_path: Path, outcome: Outcome
) -> None:
    file, write, events, note = READ[what, name]
    write(tmp_path / file)
    log = open_log(tmp_path / file)
    try:
        assert sum(len(batch) for batch in log.batches()) == events
        notes = "; ".join(log.notes[-1:])
    except DataError as error:
        assert events == 0
        notes = str(error)
    assert note in notes
    assert notes.isprintable()
    assert (str(tmp_path / file) in notes) == bool(note)
    outcome(
        "the rest is read; lines counted, the first named with its number"
        if note
        else "read as it is meant"
    )


@contextmanager
def without_root() -> Iterator[None]:
    """Give up the rights of root, which may read every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.bad_input("file: no permission", via="--source")
def test_a_log_without_permission_to_read_it_is_an_error(tmp_path: Path, outcome: Outcome) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join(EVENTS))
    path.chmod(0)
    message = rf"cannot read {path}: .*Permission denied"
    with without_root(), pytest.raises(DataError, match=message):
        open_log(path)
    outcome("exit 5, file and reason named")


READ_AND_MEASURE = """
import resource, sys
from stream_ctr.logs.open import open_log
from stream_ctr.models import MODELS

def mebibytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

log = open_log(sys.argv[1])
before = mebibytes()
events = sum(len(batch) for batch in log.batches())
print(events)
print(log.rejected.first)
print(mebibytes() - before)
"""


@pytest.mark.bad_input("file: gzip bomb", via="--source")
@pytest.mark.slow
def test_a_line_that_decompresses_without_end_takes_bounded_memory_and_is_named(
    tmp_path: Path, outcome: Outcome
) -> None:
    path = tmp_path / "log.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(EVENTS[0] + b"\n")
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + EVENTS[0] + b"\n")
    assert path.stat().st_size < 4 << 20
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, path], capture_output=True, text=True, check=True
    )
    events, first, grown_mebibytes = done.stdout.splitlines()
    assert events == "2"
    assert first == "[(2, 'the line is longer than 16 MiB')]"
    assert int(grown_mebibytes) < 100  # of 200
    outcome(
        "200 MiB in one line: that line is skipped and named, memory grows by less than 100 MiB"
    )


# -- snapshots -----------------------------------------------------------------------------------


Tensors = dict[str, np.ndarray[Any, Any]]
SAFETENSORS = "safetensors with wrong names, shapes, dtypes, NaN, or a pickle renamed"


def tensors_of(path: Path) -> Tensors:
    return dict(load((path / "model.safetensors").read_bytes()))


def renamed(tensors: Tensors) -> Tensors:
    return {("other" if name == "table" else name): array for name, array in tensors.items()}


WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a name": (renamed, "tensor 'other' is not one of this model"),
    "one too few": (
        lambda tensors: {"table": tensors["table"]},
        r"tensor 'dense\..*' is missing",
    ),
    "one too many": (
        lambda tensors: {**tensors, "dense.other": tensors["table"]},
        "tensor 'dense.other'",
    ),
    "a shape": (lambda tensors: {**tensors, "table": tensors["table"][:-1]}, "tensor 'table'"),
    "a transposed one": (
        lambda tensors: {**tensors, "table": np.ascontiguousarray(tensors["table"].T)},
        "tensor 'table'",
    ),
    "a dtype": (
        lambda tensors: {**tensors, "table": tensors["table"].astype(np.float64)},
        "tensor 'table'",
    ),
    "NaN": (
        lambda tensors: {**tensors, "table": np.full_like(tensors["table"], np.nan)},
        "not finite",
    ),
    "infinity": (
        lambda tensors: {**tensors, "table": np.full_like(tensors["table"], -np.inf)},
        "not finite",
    ),
}


@pytest.mark.bad_input(
    SAFETENSORS,
    via="a snapshot, behind a true hash",
)
@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_are_not_those_of_the_model_are_refused(
    name: str, served: Path, outcome: Outcome
) -> None:
    change, message = WRONG_TENSORS[name]
    assert Scorer(served).predict([{"app": "maps"}]).shape == (1,)
    replace_file(served, "model.safetensors", save(change(tensors_of(served))))
    with pytest.raises(SnapshotError, match=message):
        Scorer(served)
    outcome("refused, the tensor named")


@pytest.mark.bad_input(
    SAFETENSORS,
    via="a snapshot, behind a true hash",
)
@pytest.mark.parametrize(
    "data",
    [b"\x80\x04cos\nsystem\n(S'false'\ntR.", b"PK\x03\x04" + bytes(60), b""],
    ids=["pickle", "zip", "empty"],
)
def test_a_file_of_another_kind_under_a_safetensors_name_is_refused(
    data: bytes, served: Path, outcome: Outcome
) -> None:
    replace_file(served, "model.safetensors", data)
    with pytest.raises(SnapshotError, match=r"model\.safetensors is not a safetensors file"):
        Scorer(served)
    outcome("refused, the tensor named")
