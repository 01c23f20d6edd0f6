"""Bytes from outside, mutated: the decoder, the readers of logs and the loader of snapshots answer in their own terms, whatever comes."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_logs import AVAZU_HEADER, COLUMNS, OBD, avazu_line, criteo_line, nested

from stream_ctr import snapshot
from stream_ctr.config import Field
from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.events import Decoder, Events, Rejects
from stream_ctr.json_events import JsonReader
from stream_ctr.learner import NetworkLearner, make_learner
from stream_ctr.logs import FORMATS, open_log
from stream_ctr.subscribe import Scorer, Subscriber

T = 1_735_689_600_000
FIELDS = (Field("app", "categorical"), Field("age", "numeric"))


def fuzz(full: bool, quick: int, *strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Runs the function below it at once, with `quick` examples or, when `full`, thirty times as many."""
    limits = settings(max_examples=quick * 30 if full else quick, deadline=None, suppress_health_check=list(HealthCheck))

    def run(check: Callable[..., None]) -> None:
        limits(given(*strategies)(check))()

    return run


# -- mutations ----------------------------------------------------------------------------------------------------------------------

Step = tuple[str, float, float, bytes]
JUNK = [
    b"", b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\r\n", b"\t", b"\0", b"1", b"2", b"\x80", b"\x85", b"\xff", b"\xc0\xaf",
    b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J", b"null", b"true", b"NaN", b"-Infinity", b"Inf", b"1e999", b"-0", b"0.5", b"1e-400",
    b"9" * 30, b"9" * 400, b"9" * 4301, b"[" * 300, b'"\\ud800"', b'"\\u0000"', b"\\u006b", b'"2025-01-01T00:00:00Z"', b'"2025-02-30"',
    b',"app":null', b',"features":{"age":1}', b',"x":{"y":[1,"a:b"]}', "\u202e\u00e9\U0001f600".encode(), b"PAR1", b"\x1f\x8b",
    b"\x80\x04cos\nsystem\n",
]  # fmt: skip
steps = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "replace", "repeat", "drop"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from(JUNK), st.binary(max_size=6)),
    ),
    max_size=4,
)


def mutate(data: bytes, done: Sequence[Step]) -> bytes:
    """`data` after each step: a place, a length, and bytes to put there."""
    for kind, where, how_long, junk in done:
        at = int(where * (len(data) + 1))
        end = at + int(how_long * how_long * (len(data) + 1 - at))
        part = data[at:end]
        if kind == "flip" and at < len(data):
            part, end = bytes([data[at] ^ (1 << int(8 * how_long))]), at + 1
        middle = {"flip": part, "cut": b"", "insert": junk + part, "replace": junk, "repeat": part + part, "drop": b""}[kind]
        data = data[:at] + middle + (b"" if kind == "cut" else data[end:])
    return data


def mutated(*whole: bytes) -> st.SearchStrategy[bytes]:
    return st.builds(mutate, st.sampled_from(whole), steps)


# -- the decoder --------------------------------------------------------------------------------------------------------------------

EVENTS = [
    b'{"kind":"impression","impression_id":"a","time":1735689600000,"features":{"app":"maps","age":31}}',
    b'{"kind":"impression","impression_id":"b","time":1735689600000,"features":{"app":7,"age":-0.5e3},"true_probability":0.25}',
    b'{"kind":"impression","impression_id":"c","time":1735689600000,"features":{"app":true,"age":null,"x":{"y":[1,2]}}}',
    b'{"kind":"click","impression_id":"a","time":1735689600000}',
    b'{"time":"2025-01-01T00:00:04.200Z","kind":"click","impression_id":"caf\xc3\xa9"}',
    b'{ "kind" : "impression", "impression_id" : "\\ud83d\\ude00", "time" : "2025-01-01T01:00:00+01:00", "features" : {"app" : "a\\"b"} }',
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["impression", "click", "view", 1, None]),
        "impression_id": st.sampled_from(["a", "b", "", 5, None]),
        "time": st.one_of(st.integers(T, T + 10**6), st.just("2025-01-01T00:00:00Z"), json_values),
        "features": st.one_of(
            st.fixed_dictionaries({}, optional={"app": st.text(max_size=3) | json_values, "age": st.floats(-9, 9) | json_values}),
            json_values,
        ),
        "true_probability": st.floats(-1, 2) | json_values,
        "x": json_values,
    },
)
records = st.one_of(
    mutated(*EVENTS),
    documents.map(lambda d: json.dumps(d).encode("utf-8", "surrogatepass")),
    st.sampled_from(EVENTS),
    st.binary(max_size=20),
    st.none(),
)


class OneByOne(JsonReader):
    def read(self, values: Any, rows: Any) -> Any:
        return self._read_one_by_one(values, rows)


class Strict(Decoder):
    """Every JSON record by itself, through the strict parser."""

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__(fields)
        self._json = OneByOne(fields, max_record_bytes=self.max_record_bytes)


def told(decoded: tuple[Events, Rejects]) -> dict[str, Any]:
    """All of it as plain values: text that is not UTF-8 would fail here."""
    events, rejects = decoded
    shown, clicks = events.impressions, events.clicks
    return {
        "rejects": list(zip(rejects.row.tolist(), rejects.reason, rejects.message, strict=True)),
        "impressions": list(zip(shown.row.tolist(), shown.impression_id.to_pylist(), shown.time.tolist(), strict=True)),
        "features": {name: column.to_pylist() for name, column in shown.features.items()},
        "true_probability": [None if p != p else p for p in shown.true_probability.tolist()],
        "clicks": list(zip(clicks.row.tolist(), clicks.impression_id.to_pylist(), clicks.time.tolist(), strict=True)),
        "with_unknown_fields": events.with_unknown_fields,
    }


@pytest.mark.slow
def test_the_fast_way_and_the_strict_way_tell_the_same_of_any_bytes(full):

    @fuzz(full, 300, st.lists(records, min_size=1, max_size=30))
    def check(values: list[bytes | None]) -> None:
        array = pa.array(values, pa.large_binary())
        strict = told(Strict(FIELDS).decode(array))
        assert told(Decoder(FIELDS).decode(array)) == strict
        seen = sorted(row for name in ("impressions", "clicks", "rejects") for row, *_ in strict[name])
        assert seen == list(range(len(values)))  # nothing is lost, nothing is read twice
        assert all(message.isprintable() and len(message) < 300 for _, _, message in strict["rejects"])


def test_many_neighbours_of_one_mutated_record_are_read_as_without_it(full):
    good = [EVENTS[0]] * 40 + [EVENTS[3]] * 40

    @fuzz(full, 150, mutated(*EVENTS), st.integers(0, 80))
    def check(bad: bytes, at: int) -> None:
        read = told(Decoder(FIELDS).decode(pa.array([*good[:at], bad, *good[at:]], pa.large_binary())))
        others = [row - (row > at) for name in ("impressions", "clicks", "rejects") for row, *_ in read[name] if row != at]
        assert sorted(others) == list(range(80))
        assert [row for row, *_ in read["rejects"] if row != at] == []


# -- logs on disk -------------------------------------------------------------------------------------------------------------------


def in_memory(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def ipc(new_writer: Callable[..., Any], table: pa.Table) -> bytes:
    def write(stream: io.BytesIO) -> None:
        with new_writer(stream, table.schema) as writer:
            writer.write_table(table)

    return in_memory(write)


def seeds_of_logs() -> dict[str, list[bytes]]:
    """Small logs of every format, written in every way."""
    flat = pa.table(COLUMNS)
    coded = flat.set_column(3, "app", flat["app"].dictionary_encode())
    criteo = "\n".join(criteo_line(str(i % 2)) for i in range(4)).encode()
    avazu = "\n".join(avazu_line(i, i % 2) for i in range(4)).encode()
    return {
        "events": [b"\n".join(EVENTS), gzip.compress(b"\n".join(EVENTS)), bytes(pa.Codec("zstd").compress(b"\n".join(EVENTS)))],
        "criteo": [criteo],
        "avazu": [avazu, AVAZU_HEADER.encode() + b"\n" + avazu],
        "obd": [b"\n".join(OBD.read_bytes().splitlines()[:4])],
        "parquet": [
            in_memory(lambda stream: pa.parquet.write_table(coded, stream)),
            in_memory(lambda stream: pa.parquet.write_table(nested(flat), stream, compression="none", use_dictionary=False)),
        ],
        "arrow": [ipc(pa.ipc.new_file, flat), ipc(pa.ipc.new_stream, nested(coded)), ipc(pa.ipc.new_stream, coded)],
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_a_mutated_log_is_read_or_refused_by_name_and_nothing_else(full, format, tmp_path):
    seeds, numbers = seeds_of_logs()[format], itertools.count()

    @fuzz(full, 150, mutated(*seeds), st.sampled_from([None, format, format, *FORMATS]))
    def check(data: bytes, read_as: str | None) -> None:
        path = tmp_path / str(next(numbers))
        path.write_bytes(data)
        try:
            log = open_log(path, format=read_as)
            for batch in log.batches():
                assert len(batch.time) == len(batch.value.to_pylist()) == len(batch.key.to_pylist())
            messages = [*log.notes, *(reason for _, reason in log.rejected.first)]
        except DataError as error:
            messages = [str(error)]
        assert all(message.isprintable() and len(message) < 800 for message in messages)
        path.unlink()


# -- snapshots ----------------------------------------------------------------------------------------------------------------------

LEARNER = {
    "model": "deepfm", "fields": 3, "crosses": 1, "value_fields": [1], "embedding_dim": 4, "hidden": [8], "table_bits": 6, "batch_size": 8,
}  # fmt: skip
MANIFEST = {
    "model": "default", "epoch": 3, "sequence": 1, "examples": 1000, "event_time_ms": T, "created_ms": T, "learner": LEARNER,
    "beside": {"ftrl": {**LEARNER, "model": "lr", "ftrl": {"alpha": 0.1, "beta": 1.0, "l1": 0.0, "l2": 1.0}}},
    "schema": {
        "fields": [["app", "categorical"], ["age", "numeric"], ["os", "categorical"]], "table_bits": 6, "numeric_encoding": "value",
        "crosses": [["app", "os"]],
    },
}  # fmt: skip
ODD_VALUES = [
    ..., None, True, -1, 0, 1, 3, 63, 2**31, 2**62, 2**64, -(2**63), 10**400, 0.5, 1e308, "", "x", "../../x", "\x1b[2J", "\ud800", "0" * 64,
    [], [1], [30_000, 30_000], [["app", "categorical"]], {}, {"bytes": 1, "sha256": ""},
]  # fmt: skip


@pytest.fixture
def served(tmp_path):
    """A snapshot that can be served."""
    weights = NetworkLearner(**LEARNER, device="cpu").weights()
    beside = make_learner(**MANIFEST["beside"]["ftrl"])
    beside.learn(np.array([[1, 2, 3, 4], [1, 5, 3, 6]], np.int32), np.array([1, 0], np.uint8), np.ones((2, 1), np.float32))
    tensors = {"model": weights, "ftrl.model": beside.weights()}
    return snapshot.write(tmp_path / "snapshots", tensors=tensors, manifest=MANIFEST, snapshot_id="00000001-x")


def sign_again(path: Path, name: str, data: bytes) -> None:
    """Other bytes behind a true hash: what stands below the hash is reached."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document but the document itself."""
    children = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


def changed(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    tree = json.loads(json.dumps(tree))
    owner = tree
    for key in place[:-1]:
        owner = owner[key]
    if value is ...:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return tree


def refusal(read: Callable[[], object]) -> str:
    """Why it cannot be read; nothing when it can."""
    try:
        read()
    except SnapshotError as error:
        return str(error)
    return ""


def serve(path: Path) -> None:
    """Everything that reads a snapshot: each loads it or says in its own terms, and briefly, why not; what is loaded predicts."""
    for read in (snapshot.load, snapshot.verify, lambda path: snapshot.newest(path.parent), predict, predict_beside):
        assert len(refusal(lambda read=read: read(path))) < 1000


def predict(path: Path) -> None:
    assert np.isfinite(Scorer(path).predict([{"app": "maps", "age": 31}, {}])).all()


def predict_beside(path: Path) -> None:
    assert np.isfinite(Scorer(path, model="ftrl").predict([{"app": "maps", "age": 31}, {}])).all()


def test_a_mutated_manifest_is_refused_or_loads(full, served):
    text = (served / "manifest.json").read_bytes()

    @fuzz(full, 100, mutated(text))
    def check(data: bytes) -> None:
        (served / "manifest.json").write_bytes(data)
        serve(served)


def test_a_manifest_with_odd_values_in_any_place_is_refused_or_loads(full, served):
    manifest = json.loads((served / "manifest.json").read_bytes())

    @fuzz(full, 120, st.sampled_from(places(manifest)), st.sampled_from(ODD_VALUES))
    def check(place: tuple[Any, ...], value: Any) -> None:
        (served / "manifest.json").write_text(json.dumps(changed(manifest, place, value)))
        serve(served)


def test_mutated_tensors_behind_a_true_hash_are_refused_or_load(full, served):
    whole = (served / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    numbers = st.floats(allow_nan=True, width=32).map(lambda number: np.float32(number).tobytes())

    def rebuilt(place: tuple[Any, ...], value: Any) -> bytes:
        text = json.dumps(changed(header, place, value)).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    def with_number(where: float, number: bytes) -> bytes:
        at = 8 + size + 4 * int(where * ((len(whole) - 8 - size) // 4))
        return whole[:at] + number + whole[at + 4 :]

    files = st.one_of(
        mutated(whole),
        mutated(whole[: 8 + size]).map(lambda head: head + whole[8 + size :]),
        st.builds(rebuilt, st.sampled_from(places(header)), st.sampled_from([*ODD_VALUES, "I64", "BF16", "F64", [64, 16], [1, 8]])),
        st.builds(with_number, st.floats(0, 1, exclude_max=True), numbers),
        st.sampled_from([b"", b"\x80\x04cos\nsystem\n(S'false'\ntR.", b"\xff" * 8, (2**63).to_bytes(8, "little") + b"{}", b"PK\x03\x04"]),
    )

    @fuzz(full, 150, files)
    def check(data: bytes) -> None:
        sign_again(served, "model.safetensors", data)
        serve(served)


def test_a_mutated_pointer_is_refused_or_leads_somewhere(full, served, tmp_path):
    pointer = snapshot.pointer_for(served, snapshot.verify(served))
    latest = tmp_path / "latest.json"
    elsewhere = [f"{place}/{served.name}" for place in ("/" + "x" * 5000, "/a\0b", "/\ud800", "/dev/null", "//", tmp_path)]
    values = st.sampled_from([*ODD_VALUES, *elsewhere])
    odd = st.builds(changed, st.just(pointer), st.sampled_from([("path",), *places(pointer)]), values)

    @fuzz(full, 200, st.one_of(mutated(json.dumps(pointer).encode()), odd.map(lambda other: json.dumps(other).encode())))
    def check(data: bytes) -> None:
        latest.write_bytes(data)
        subscriber = Subscriber(tmp_path)
        subscriber.next(0.0)  # what it is pointed to it loads, or passes over with a warning
        assert len(refusal(lambda: snapshot.read_pointer(latest))) < 1000
