"""Everything that may come instead of an event: kept with its reason, counted, never trained, and no harm to what comes beside it."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from support.commands import command, own_topics, read_headers, succeed
from support.event_records import FIELDS, GOOD, T, features, record
from support.fuzzing import (
    EVENTS,
    Strict,
    ipc,
    told,
)
from support.lineage import SMALL, Fingerprint, last_report, newest
from support.manifests import replace_file
from support.patience import PATIENCE_SECONDS
from support.sample_logs import AVAZU_HEADER, COLUMNS, OBD, avazu_line, criteo_line, nested

from stream_ctr import Scorer
from stream_ctr.connectors import kafka
from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field
from stream_ctr.logs.open import open_log

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
        "invalid UTF-8 in a member that nobody reads": (GOOD[:-1] + b',"x":"\xff"}', "not_json"),
        "lone surrogate": (GOOD.replace(b"maps", b"\\ud800"), "not_json"),
        "control character": (GOOD.replace(b"maps", b"m\x01"), "not_json"),
    },
    "NaN, Infinity, 1e999": {
        "NaN": (GOOD.replace(b"31", b"NaN"), "not_json"),
        "Infinity": (GOOD.replace(b"31", b"Infinity"), "not_json"),
        "1e999": (GOOD.replace(b"31", b"1e999"), "not_json"),
        "NaN as probability": (GOOD[:-1] + b',"true_probability":NaN}', "not_json"),
        "-Infinity in a member that nobody reads": (GOOD[:-1] + b',"x":-Infinity}', "not_json"),
    },
    "integer beyond 2^63": {
        "as time": (record(time=2**63), "wrong_time"),
        "as category": (features(app=2**63), "wrong_type"),
        "of 400 digits as number": (GOOD.replace(b"31", b"9" * 400), "wrong_type"),
        "of 5,000 digits in a member that nobody reads": (
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
        "a number as id": (record(impression_id=5), "wrong_type"),
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
    "time 0, negative, in seconds, far future, text": {
        "0": (record(time=0), "time_out_of_range"),
        "negative": (record(time=-T), "time_out_of_range"),
        "seconds": (record(time=T // 1000), "time_out_of_range"),
        "microseconds": (record(time=T * 1000), "time_out_of_range"),
        "a fraction": (record(time=T + 0.5), "wrong_time"),
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

# What looks odd and is good: each with how many of its members nobody reads.
ODD = {
    ("unknown extra fields", "one"): (features(extra={"deep": [1, {"a": ":"}]}), True),
    ("unknown extra fields", "at the top"): (record(server="x"), True),
    ("unknown extra fields", "null"): (record(server=None), False),
    ("100,000 features", "of two letters"): (features(**{f"{i:05d}": 1 for i in range(70_000)}), True),
    ("duplicate keys", "the last wins"): (GOOD.replace(b'"age":31', b'"age":1,"age":31'), True),
    ("duplicate keys", "of the features"): (GOOD.replace(b'"features"', b'"features":{"app":"x"},"features"'), True),
    ("CR/LF, ANSI escapes, 1 MB of garbage in an id", "escaped in JSON"): (record(impression_id="a\r\n\x1b[2J\u202e:"), False),
    ("path-like names", "as id"): (record(impression_id="../../../etc/passwd\0"), False),
    ("not JSON, truncated, trailing bytes", "white space is none"): (b" " + GOOD + b"\r\n", False),
}  # fmt: skip


def each(cases: Any, via: str) -> list[Any]:
    """The cases, each marked as evidence for its row of the table."""
    return [
        pytest.param(*key, marks=pytest.mark.bad_input(key[0], via=via), id=f"{key[0]}: {key[1]}")
        for key in cases
    ]


def all_of(via: str) -> Callable[[Any], Any]:
    """One test that is evidence for every row."""

    def mark(test: Any) -> Any:
        for what in reversed(ITEMS):
            test = pytest.mark.bad_input(what, via=via)(test)
        return test

    return mark


# -- a record ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "name"), each(BAD, "JSON records"))
def test_a_bad_record_is_rejected_with_its_reason_and_harms_no_other(what, name, outcome):
    value, reason = BAD[what, name]
    for decoder in (Decoder(FIELDS), Strict(FIELDS)):
        for before, after in (
            (0, 0),
            (1, 1),
            (70, 50),
        ):  # alone, in a block that is small, in one that is halved
            events, rejects = decoder.decode(
                pa.array([*[GOOD] * before, value, *[GOOD] * after], pa.large_binary())
            )
            assert (rejects.row.tolist(), rejects.reason) == ([before], [reason])
            assert rejects.message[0].isprintable()
            assert len(rejects.message[0]) < 300
            assert events.impressions.row.tolist() == [
                *range(before),
                *range(before + 1, before + 1 + after),
            ]
            assert set(events.impressions.features["app"].to_pylist()) <= {"maps"}
    outcome("counted, no dead letter" if value is None else f"dead letter: {reason}")


@pytest.mark.parametrize(("what", "name"), each(ODD, "JSON records"))
def test_an_odd_record_is_read_and_what_nobody_reads_of_it_is_counted(what, name, outcome):
    value, unknown = ODD[what, name]
    for decoder in (Decoder(FIELDS), Strict(FIELDS)):
        for around in (0, 1, 60):
            read = told(
                decoder.decode(
                    pa.array([GOOD] * around + [value] + [GOOD] * around, pa.large_binary())
                )
            )
            assert read["rejects"] == []
            assert [column[around] for column in read["features"].values()] == ["maps", 31.0]
            assert read["with_unknown_fields"] == unknown
    outcome("accepted, counted as fields_unknown" if unknown else "accepted")


def test_members_that_nobody_reads_are_counted_as_a_reader_of_every_member_counts_them():
    def unread(value: bytes) -> bool:
        pairs = json.loads(
            value, object_pairs_hook=lambda pairs: [pair for pair in pairs if pair[1] is not None]
        )
        names = [name for name, _ in pairs]
        inner = [name for name, value in pairs if name == "features" for name, _ in value]
        known = {"kind", "impression_id", "time", "features", "true_probability"}
        return bool(
            len(names) > len(set(names) & known) or len(inner) > len(set(inner) & {"app", "age"})
        )

    rng = np.random.default_rng(0)
    values = []
    for _ in range(300):
        document = json.loads(EVENTS[rng.integers(len(EVENTS))])
        if rng.random() < 0.5:
            document["features"] = {
                name: value
                for name, value in (
                    ("app", "a:b"),
                    ("age", 5),
                    ("x", '"y":1'),
                    ("z", {"q": ["a:b", {"r": None}]}),
                    ("n", None),
                )
                if rng.random() < 0.4
            }
        values.append(json.dumps(document, indent=2 if rng.random() < 0.3 else None).encode())
    events, rejects = Decoder(FIELDS).decode(pa.array(values, pa.large_binary()))
    assert len(rejects) == 0
    assert 50 < events.with_unknown_fields == sum(map(unread, values)) < 250


@pytest.mark.bad_input(
    "time 0, negative, in seconds, far future, text",
    via="Kafka records, whose time the broker knows",
)
def test_an_event_far_ahead_of_its_record_is_rejected_and_one_without_a_record_time_is_not(outcome):
    ahead = record(time=T + 300_001)
    values = pa.array(
        [ahead, ahead, record(time=T + 300_000), record(time=T - 10**10)], pa.large_binary()
    )
    events, rejects = Decoder(FIELDS).decode(values, np.array([T, -1, T, T]))
    assert (rejects.row.tolist(), rejects.reason) == ([0], ["time_in_future"])
    assert events.impressions.row.tolist() == [1, 2, 3]
    outcome("dead letter: time_in_future")


@pytest.mark.bad_input("a value that decompresses past the limit", via="records")
def test_a_record_over_the_size_limit_is_rejected_unread(outcome):
    events, rejects = Decoder(FIELDS, max_record_bytes=200).decode(
        pa.array([GOOD, features(app="m" * 200)], pa.large_binary())
    )
    assert (rejects.reason, len(events.impressions)) == (["too_large"], 1)
    outcome("dead letter: too_large")


@pytest.mark.bad_input("a number that float32 does not hold", via="features")
@pytest.mark.parametrize("encoding", ["value", "log_value", "buckets"])
def test_a_number_of_any_size_becomes_a_finite_multiplier(encoding, outcome):
    numbers = pa.array([1e38, -1e38, 1e300, -1e300, 1.7976931348623157e308, 5e-324, None])
    hasher = Hasher(FIELDS[1:], table_bits=8, numeric_encoding=encoding)
    with np.errstate(all="raise", under="ignore"):
        ids, values = hasher.rows({"age": numbers})
    assert ((ids >= 0) & (ids < 256)).all()
    assert np.isfinite(values).all()
    assert values.shape == (7, len(hasher.value_fields))
    outcome("cut to what float32 holds")


# -- a whole run ---------------------------------------------------------------------------------


def stream(impressions: int) -> list[bytes]:
    """Impressions and clicks in time order; who is shown maps clicks more often."""
    rng = np.random.default_rng(7)
    events = []
    for i in range(impressions):
        at, app = T + 50 * i, ["maps", "mail", "chat"][rng.integers(3)]
        events.append(
            (
                at,
                record(
                    impression_id=f"i{i}",
                    time=at,
                    features={"app": app, "age": int(rng.integers(80))},
                ),
            )
        )
        if rng.random() < (0.5 if app == "maps" else 0.1):
            events.append((at + 900, click(f"i{i}", at + 900)))
    return [value for _, value in sorted(events, key=lambda event: event[0])]


def click(identity: str, time: int) -> bytes:
    return json.dumps({"kind": "click", "impression_id": identity, "time": time}).encode()


REPEATED = 40


def repeated() -> list[bytes]:
    """Impressions that were there, with other features; clicks of impressions that have one."""
    clicked = [json.loads(value) for value in stream(500) if b"click" in value][:REPEATED]
    again = [
        record(impression_id=f"i{i}", time=T + 50 * i + 3, features={"app": "other", "age": 1})
        for i in range(REPEATED)
    ]
    return again + [click(event["impression_id"], event["time"] + 3) for event in clicked]


def among(events: list[bytes], others: list[Any]) -> list[Any]:
    """The others evenly between the events."""
    step = len(events) // (len(others) + 1)
    mixed: list[Any] = []
    for i, other in enumerate(others):
        mixed += [*events[i * step : (i + 1) * step], other]
    return mixed + events[len(others) * step :]


RUN = [
    *SMALL,
    *(
        part
        for pair in ("features.categorical=app", "features.numeric=age", "baseline.enabled=true")
        for part in ("-X", pair)
    ),
]


def learned_the_same(one: Fingerprint | None, other: Fingerprint | None) -> bool:
    assert one
    assert other
    return (one.examples, one.ledger, one.weights_sha256) == (
        other.examples,
        other.ledger,
        other.weights_sha256,
    ) and one.same(other, "model", "optimizer", "baseline", "metrics")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Fingerprint:
    """What is learned of the good events alone."""
    folder = tmp_path_factory.mktemp("clean")
    (folder / "log.jsonl").write_bytes(b"\n".join(stream(3000)))
    succeed("run", "--source", folder / "log.jsonl", "--state", folder / "state", *RUN)
    found = newest(folder / "state")
    assert found
    assert found.examples == 3000
    return found


@pytest.mark.slow
@all_of("a log of JSON lines")
@pytest.mark.bad_input("same id with other features, two clicks", via="a log of JSON lines")
@pytest.mark.bad_input("unknown extra fields", via="a log of JSON lines")
def test_a_log_with_everything_bad_between_the_good_lines_teaches_what_it_teaches_without(
    clean, tmp_path, outcome
):
    bad = [
        (value, reason)
        for value, reason in BAD.values()
        if value is not None and value.strip() and b"\n" not in value
    ]
    extra = [value[:-1] + b',"server":"x"}' for value in stream(3000)[:100]]
    log = tmp_path / "log.jsonl"
    log.write_bytes(
        b"\n".join(among([*extra, *stream(3000)[100:]], [value for value, _ in bad] + repeated()))
    )
    result = succeed("run", "--source", log, "--state", tmp_path / "state", *RUN)
    assert learned_the_same(newest(tmp_path / "state"), clean)
    counters = last_report(tmp_path / "state")["counters"]
    assert {reason: counters[f"rejected.{reason}"] for _, reason in bad} == Counter(
        reason for _, reason in bad
    )
    assert counters["rejected"] == len(bad)
    assert (counters["impressions_duplicate"], counters["clicks_duplicate"]) == (REPEATED, REPEATED)
    assert counters["fields_unknown"] == len(extra)
    letters = [
        json.loads(line)
        for line in (tmp_path / "state" / "dead_letters.jsonl").read_text().splitlines()
    ]
    kept = sorted(
        (base64.b64decode(letter["value_base64"]), letter["reason"]) for letter in letters
    )
    assert kept == sorted(bad)
    assert "\x1b" not in result.output
    outcome(
        "counted by reason, kept with its bytes; ledger, weights, baseline, metrics equal to the log without it"
    )


@pytest.mark.slow
@all_of("a Kafka topic")
@pytest.mark.bad_input("key differs from id", via="a Kafka topic")
def test_a_topic_with_everything_bad_between_the_good_records_teaches_what_it_teaches_without(
    embedded_broker, topic, clean, tmp_path, outcome
):
    """The keys are anybody's: a key says where a record goes, the id in the value says what it is."""
    bad = [
        (value, reason) for value, reason in BAD.values() if value is None or len(value) < 500_000
    ]
    values = among(stream(3000), [value for value, _ in bad] + repeated())
    client = kafka.client_options(embedded_broker, {})
    kafka.ensure_topic(client, topic)
    sink = kafka.KafkaSink(client)
    keys = pa.array([f"key {i % 7}".encode() for i in range(len(values))], pa.large_binary())
    sink.send_batch(topic, pa.array(values, pa.large_binary()), keys=keys)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    args = [
        "--topic",
        topic,
        "--bootstrap-servers",
        embedded_broker,
        "--until-end",
        *own_topics(topic),
    ]
    result = succeed("run", "--state", tmp_path, *args, *RUN)
    assert learned_the_same(newest(tmp_path), clean)
    final = last_report(tmp_path)
    assert {reason: final["counters"][f"rejected.{reason}"] for _, reason in bad} == Counter(
        reason for _, reason in bad
    )
    assert final["counters"]["records"] == len(values)  # every offset is passed
    letters = read_headers(embedded_broker, f"{topic}.dlq")
    expected = [(value, reason.encode()) for value, reason in bad if value is not None]
    assert sorted(
        (value or b"", headers["__stream_ctr.errors.reason"]) for value, headers in letters
    ) == sorted(expected)
    assert "\x1b" not in result.output
    outcome(
        "counted by reason; on the dead-letter topic with its bytes and reason; ledger, weights, baseline, metrics equal to the clean run"
    )


@pytest.mark.bad_input("path-like names", via="fields")
@pytest.mark.parametrize("kind", ["numeric", "categorical"])
def test_the_name_of_a_field_is_harmless_in_messages(kind, outcome):
    name = "../\x1b[31m" + 300 * "x"
    _, rejects = Decoder([Field(name, kind)]).decode(
        pa.array([record(features={name: [1]})], pa.large_binary())
    )
    assert rejects.message[0].isprintable()
    assert len(rejects.message[0]) < 300
    outcome("escaped and cut")


@pytest.mark.bad_input("path-like names", via="fields, model name, ids")
@pytest.mark.slow
def test_names_that_look_like_paths_or_steer_a_terminal_are_names_and_nothing_else(
    tmp_path, outcome
):
    names = {"../../x": "../../y", "/etc/passwd": "z", "\x1b[31mred": "\r\n", "nul\0": "\0"}
    values = [record(impression_id=f"../{i}", time=T + 50 * i, features=names) for i in range(300)]
    state = tmp_path / "a" / "b" / "state"
    (tmp_path / "log.jsonl").write_bytes(
        b"\n".join([*values, *(click(f"../{i}", T + 50 * 300) for i in range(9))])
    )
    result = succeed(
        "run",
        "--source",
        tmp_path / "log.jsonl",
        "--state",
        state,
        *SMALL,
        "-X",
        "snapshots.model_name=../../model",
    )
    assert last_report(state)["counters"]["clicks_joined"] == 9
    assert "\x1b" not in result.output
    assert sorted(
        path.name for path in tmp_path.rglob("*") if state not in (path, *path.parents)
    ) == ["a", "b", "log.jsonl"]
    outcome("names only: nothing is written outside the state directory")


# -- files ---------------------------------------------------------------------------------------


def parquet(table: pa.Table) -> Callable[[Path], object]:
    return lambda path: pa.parquet.write_table(table, path)


def altered(**columns: Any) -> Callable[[Path], object]:
    """The columns of a good file but for these; None: without it."""
    table = pa.table(
        {name: values for name, values in {**COLUMNS, **columns}.items() if values is not None}
    )
    return parquet(table)


def half_a_parquet_file(path: Path) -> None:
    parquet(pa.table(COLUMNS))(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put(data: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


CRITEO = "\n".join(criteo_line(str(i % 2)) for i in range(3))
# Name of the row, of the case, the file, and what `run --source` says of it; it ends with exit code 5.
REFUSED: dict[tuple[str, str], tuple[str, Callable[[Path], object], str]] = {
    ("file: empty, binary, of another kind", "empty"): ("log.jsonl", put(b""), "is empty"),
    ("file: empty, binary, of another kind", "blank lines"): ("log.jsonl", put(b"\n\r\n \n"), "is empty"),
    ("file: empty, binary, of another kind", "binary"): ("log.jsonl", put(bytes(range(256)) * 9), "no known log format"),
    ("file: empty, binary, of another kind", "a folder"): ("log.jsonl", lambda path: path.mkdir(), "is a directory"),
    ("file: empty, binary, of another kind", "there is none"): ("log.jsonl", lambda path: None, "does not exist"),
    ("file: empty, binary, of another kind", "a pipe"): ("log.jsonl", os.mkfifo, "is not a regular file"),
    ("file: empty, binary, of another kind", "text under a Parquet name"): ("log.parquet", put("a;b\n1;2\n"), "no known log format"),
    ("file: gzip cut off or no gzip", "only its head"): ("log.gz", put(b"\x1f\x8b\x08\0"), "cannot read"),
    ("file: gzip cut off or no gzip", "of nothing"): ("log.gz", put(gzip.compress(b"")), "is empty"),
    ("file: header row where none belongs, and none where one does", "Open Bandit without"): (
        "log.csv", put(b"\n".join(OBD.read_bytes().splitlines()[1:9])), "no known log format"),
    ("file: header row where none belongs, and none where one does", "Avazu without labels"): (
        "log.csv", put(AVAZU_HEADER.replace("click,", "") + "\n" + avazu_line(1)), "has no column click"),
    ("file: Parquet of other columns", "no time"): ("log.parquet", altered(time=None), "there is no column time"),
    ("file: Parquet of other columns", "time a fraction"): ("log.parquet", altered(time=[0.5] * 7), "column time is double"),
    ("file: Parquet of other columns", "kind a number"): ("log.parquet", altered(kind=[1] * 7), "column kind is int64"),
    ("file: Parquet of other columns", "probability text"): (
        "log.parquet", altered(true_probability=["x"] * 7), "column true_probability is string, not a number"),
    ("file: Parquet of other columns", "a feature nested"): ("log.parquet", altered(app=[[1]] * 7), "column app is list"),
    ("file: Parquet of other columns", "a feature of bytes"): ("log.parquet", altered(app=[b"\xff"] * 7), "column app is binary"),
    ("file: Parquet of other columns", "features text"): ("log.parquet", altered(features=["x"] * 7), "column features is string"),
    ("file: Parquet of other columns", "a name that steers a terminal"): (
        "log.parquet", altered(**{"\x1b[31m": [[1]] * 7}), r"column \x1b[31m is list"),
    ("file: Parquet of other columns", "a column twice"): (
        "log.parquet", parquet(pa.table([*pa.table(COLUMNS).columns, pa.nulls(7)], [*COLUMNS, "app"])), "column app appears twice"),
    ("file: Parquet empty or cut off", "no rows"): ("log.parquet", parquet(pa.table(COLUMNS).slice(0, 0)), "nothing in"),
    ("file: Parquet empty or cut off", "cut off"): ("log.parquet", half_a_parquet_file, "is not a parquet file"),
    ("file: Parquet empty or cut off", "all null"): ("log.parquet", altered(kind=pa.nulls(7, pa.string())), "must be"),
}  # fmt: skip


@pytest.mark.parametrize(("what", "name"), each(REFUSED, "--source"))
def test_a_file_that_is_no_log_ends_the_run_with_5_and_is_named(what, name, tmp_path, outcome):
    file, write, message = REFUSED[what, name]
    write(tmp_path / file)
    result = command("run", "--source", tmp_path / file, "--state", tmp_path / "state", *SMALL)
    assert result.exit_code == 5, result.output
    assert str(tmp_path / file) in result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    outcome("exit 5, file and reason named")


# The file, how many events are in it all the same, and what its notes say.
READ: dict[tuple[str, str], tuple[str, Callable[[Path], object], int, str]] = {
    ("file: CRLF, byte order mark, half a last line", "CRLF"): ("log.jsonl", put(b"\r\n".join(EVENTS)), 6, ""),
    ("file: CRLF, byte order mark, half a last line", "Criteo with CRLF"): ("log.tsv", put(CRITEO.replace("\n", "\r\n")), 4, ""),
    ("file: CRLF, byte order mark, half a last line", "byte order mark"): ("log.jsonl", put(b"\xef\xbb\xbf" + EVENTS[0]), 1, ""),
    ("file: CRLF, byte order mark, half a last line", "half a line"): ("log.tsv", put(CRITEO[:-40]), 3, ":3: expected 40 columns, got"),
    ("file: gzip cut off or no gzip", "in the middle"): (
        "log.tsv.gz", put(gzip.compress(f"{CRITEO}\n".encode() * 300, 0)[:20_000]), 81, "damaged here, what comes after is lost"),
    ("file: header row where none belongs, and none where one does", "Criteo with one"): (
        "log.tsv", put("\t".join(["label", *(f"x{i}" for i in range(39))]) + "\n" + CRITEO), 4, ":1: label must be 0 or 1, got 'label'"),
    ("file: header row where none belongs, and none where one does", "Avazu with another one in it"): (
        "log.csv", put("\n".join([AVAZU_HEADER, avazu_line(1), AVAZU_HEADER, avazu_line(2)])), 2, ":3: hour must be YYMMDDHH, got 'hour'"),
    ("label not 0 or 1", "2"): ("log.tsv", put(CRITEO + "\n" + criteo_line("2")), 4, ":4: label must be 0 or 1, got '2'"),
    ("label not 0 or 1", "nothing"): ("log.tsv", put(CRITEO + "\n" + criteo_line("")), 4, ":4: label must be 0 or 1, got nothing"),
    ("label not 0 or 1", "steering a terminal"): ("log.csv", put(f"{avazu_line(1)}\n{avazu_line(2, chr(27))}"), 1, r"got '\x1b'"),
    ("file: Parquet rows without id, kind or time", "in columns"): ("log.parquet", parquet(pa.table(COLUMNS)), 3, "4 lines cannot be read"),
    ("file: Parquet rows without id, kind or time", "in a struct"): (
        "log.parquet", parquet(nested(pa.table(COLUMNS))), 3, "4 lines cannot be read"),
    ("file: Parquet rows without id, kind or time", "times out of range"): (
        "log.parquet", altered(time=pa.array([2**62, 0, 1, 2, 3, 4, T]).cast(pa.timestamp("us"))), 0, "time must be"),
    ("file: Arrow rows without id, kind or time", "times that no calendar has"): (
        "log.arrow", put(ipc(pa.ipc.new_file, pa.table({**COLUMNS, "time": pa.array([2**62] * 7, pa.timestamp("s"))}))), 0, "time must be"),
    ("file: Parquet text that is not UTF-8", "in a feature"): (
        "log.parquet", altered(app=pa.array([b"\xff\"", *[b"x"] * 6], pa.binary()).view(pa.string())), 2, "text that is not UTF-8"),
    ("file: Parquet text that is not UTF-8", "in an id"): (
        "log.parquet", altered(impression_id=pa.array([b"\xff", *[b"x"] * 6], pa.binary()).view(pa.string())), 3, "text that is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("what", "name"), each(READ, "--source"))
def test_a_file_with_bad_rows_is_read_past_them_and_the_first_is_named_with_its_line(
    what, name, tmp_path, outcome
):
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
def as_nobody() -> Iterator[None]:
    """Without the rights of root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.bad_input("file: no permission", via="--source")
def test_a_log_that_may_not_be_read_is_said_so(tmp_path, outcome):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join(EVENTS))
    path.chmod(0)
    with as_nobody(), pytest.raises(DataError, match=rf"cannot read {path}: .*Permission denied"):
        open_log(path)
    outcome("exit 5, file and reason named")


BOMB = """
import resource, sys
from stream_ctr.logs.open import open_log
log = open_log(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
events = sum(len(batch) for batch in log.batches())
print(events, log.rejected.first, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.bad_input("file: gzip bomb", via="--source")
@pytest.mark.slow
def test_a_line_that_decompresses_without_end_takes_bounded_memory_and_is_named(tmp_path, outcome):
    path = tmp_path / "log.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(EVENTS[0] + b"\n")
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + EVENTS[0] + b"\n")
    assert path.stat().st_size < 4 << 20
    done = subprocess.run(
        [sys.executable, "-c", BOMB, path], capture_output=True, text=True, check=True
    )
    events, *first, grown = (
        done.stdout.split(maxsplit=1)[0],
        *done.stdout.split(maxsplit=1)[1].rsplit(maxsplit=1),
    )
    assert events == "2"
    assert first == ["[(2, 'the line is longer than 16 MiB')]"]
    assert int(grown) < 100  # MiB, of 200
    outcome(
        "200 MiB in one line: that line is skipped and named, memory grows by less than 100 MiB"
    )


# -- snapshots -----------------------------------------------------------------------------------


def tensors_of(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load

    return dict(load((path / "model.safetensors").read_bytes()))


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {("other" if name == "table" else name): array for name, array in tensors.items()}


WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a name": (renamed, "tensor 'table' is missing"),
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
    "safetensors with wrong names, shapes, dtypes, NaN, or a pickle renamed",
    via="a snapshot, behind a true hash",
)
@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_are_not_those_of_the_model_are_refused(name, served, outcome):  # noqa: F811
    from safetensors.numpy import save

    change, message = WRONG_TENSORS[name]
    assert Scorer(served).predict([{}]).shape == (1,)
    replace_file(served, "model.safetensors", save(change(tensors_of(served))))
    with pytest.raises(SnapshotError, match=message):
        Scorer(served)
    outcome("refused, the tensor named")


@pytest.mark.bad_input(
    "safetensors with wrong names, shapes, dtypes, NaN, or a pickle renamed",
    via="a snapshot, behind a true hash",
)
@pytest.mark.parametrize(
    "data",
    [b"\x80\x04cos\nsystem\n(S'false'\ntR.", b"PK\x03\x04" + bytes(60), b""],
    ids=["pickle", "zip", "empty"],
)
def test_a_file_of_another_kind_under_a_safetensors_name_is_refused(data, served, outcome):  # noqa: F811
    replace_file(served, "model.safetensors", data)
    with pytest.raises(SnapshotError, match=r"model\.safetensors is not a safetensors file"):
        Scorer(served)
    outcome("refused, the tensor named")
