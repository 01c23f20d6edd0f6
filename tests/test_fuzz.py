"""Bytes from outside, mutated: the decoder, the readers of logs and the loader of snapshots answer in their own terms, whatever comes."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import strategies as st
from support.fuzzing import (
    EVENTS,
    Strict,
    T,
    fuzz,
    in_memory,
    ipc,
    mutated,
    told,
)
from support.manifests import replace_file
from support.sample_logs import AVAZU_HEADER, COLUMNS, OBD, avazu_line, criteo_line, nested

from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.logs.open import FORMATS, open_log
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import encode_pointer, pointer_for, read_pointer
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber

FIELDS = (Field("app", "categorical"), Field("age", "numeric"))


# -- mutations -----------------------------------------------------------------------------------


# -- the decoder ---------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["impression", "click", "view", 1, None]),
        "impression_id": st.sampled_from(["a", "b", "", 5, None]),
        "time": st.one_of(st.integers(T, T + 10**6), st.just("2025-01-01T00:00:00Z"), json_values),
        "features": st.one_of(
            st.fixed_dictionaries(
                {},
                optional={
                    "app": st.text(max_size=3) | json_values,
                    "age": st.floats(-9, 9) | json_values,
                },
            ),
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


@pytest.mark.slow
def test_the_fast_way_and_the_strict_way_tell_the_same_of_any_bytes(full):

    @fuzz(full, 300, st.lists(records, min_size=1, max_size=30))
    def check(values: list[bytes | None]) -> None:
        array = pa.array(values, pa.large_binary())
        strict = told(Strict(FIELDS).decode(array))
        assert told(Decoder(FIELDS).decode(array)) == strict
        seen = sorted(
            row for name in ("impressions", "clicks", "rejects") for row, *_ in strict[name]
        )
        assert seen == list(range(len(values)))  # nothing is lost, nothing is read twice
        assert all(
            message.isprintable() and len(message) < 300 for _, _, message in strict["rejects"]
        )


def test_many_neighbours_of_one_mutated_record_are_read_as_without_it(full):
    good = [EVENTS[0]] * 40 + [EVENTS[3]] * 40

    @fuzz(full, 150, mutated(*EVENTS), st.integers(0, 80))
    def check(bad: bytes, at: int) -> None:
        read = told(
            Decoder(FIELDS).decode(pa.array([*good[:at], bad, *good[at:]], pa.large_binary()))
        )
        others = [
            row - (row > at)
            for name in ("impressions", "clicks", "rejects")
            for row, *_ in read[name]
            if row != at
        ]
        assert sorted(others) == list(range(80))
        assert [row for row, *_ in read["rejects"] if row != at] == []


# -- logs on disk --------------------------------------------------------------------------------


def seeds_of_logs() -> dict[str, list[bytes]]:
    """Small logs of every format, written in every way."""
    flat = pa.table(COLUMNS)
    coded = flat.set_column(3, "app", flat["app"].dictionary_encode())
    criteo = "\n".join(criteo_line(str(i % 2)) for i in range(4)).encode()
    avazu = "\n".join(avazu_line(i, i % 2) for i in range(4)).encode()
    return {
        "events": [
            b"\n".join(EVENTS),
            gzip.compress(b"\n".join(EVENTS)),
            bytes(pa.Codec("zstd").compress(b"\n".join(EVENTS))),
        ],
        "criteo": [criteo],
        "avazu": [avazu, AVAZU_HEADER.encode() + b"\n" + avazu],
        "obd": [b"\n".join(OBD.read_bytes().splitlines()[:4])],
        "parquet": [
            in_memory(lambda stream: pa.parquet.write_table(coded, stream)),
            in_memory(
                lambda stream: pa.parquet.write_table(
                    nested(flat), stream, compression="none", use_dictionary=False
                )
            ),
        ],
        "arrow": [
            ipc(pa.ipc.new_file, flat),
            ipc(pa.ipc.new_stream, nested(coded)),
            ipc(pa.ipc.new_stream, coded),
        ],
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


# -- snapshots -----------------------------------------------------------------------------------

ODD_VALUES = [
    ..., None, True, -1, 0, 1, 3, 63, 2**31, 2**62, 2**64, -(2**63), 10**400, 0.5, 1e308, "", "x", "../../x", "\x1b[2J", "\ud800", "0" * 64,
    [], [1], [30_000, 30_000], [["app", "categorical"]], {}, {"bytes": 1, "sha256": ""},
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document but the document itself."""
    children = (
        list(tree.items())
        if isinstance(tree, dict)
        else list(enumerate(tree))
        if isinstance(tree, list)
        else []
    )
    return [
        place for key, child in children for place in ((*path, key), *places(child, (*path, key)))
    ]


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
    for read in (
        snapshot.load,
        snapshot.verify,
        lambda path: snapshot.newest(path.parent),
        predict,
        predict_beside,
    ):
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
        st.builds(
            rebuilt,
            st.sampled_from(places(header)),
            st.sampled_from([*ODD_VALUES, "I64", "BF16", "F64", [64, 16], [1, 8]]),
        ),
        st.builds(with_number, st.floats(0, 1, exclude_max=True), numbers),
        st.sampled_from(
            [
                b"",
                b"\x80\x04cos\nsystem\n(S'false'\ntR.",
                b"\xff" * 8,
                (2**63).to_bytes(8, "little") + b"{}",
                b"PK\x03\x04",
            ]
        ),
    )

    @fuzz(full, 150, files)
    def check(data: bytes) -> None:
        replace_file(served, "model.safetensors", data)
        serve(served)


def test_a_mutated_pointer_is_refused_or_leads_somewhere(full, served, tmp_path):
    pointer = json.loads(encode_pointer(pointer_for(served, snapshot.verify(served))))
    latest = tmp_path / "latest.json"
    elsewhere = [
        f"{place}/{served.name}"
        for place in ("/" + "x" * 5000, "/a\0b", "/\ud800", "/dev/null", "//", tmp_path)
    ]
    values = st.sampled_from([*ODD_VALUES, *elsewhere])
    odd = st.builds(
        changed, st.just(pointer), st.sampled_from([("path",), *places(pointer)]), values
    )

    @fuzz(
        full,
        200,
        st.one_of(
            mutated(json.dumps(pointer).encode()), odd.map(lambda other: json.dumps(other).encode())
        ),
    )
    def check(data: bytes) -> None:
        latest.write_bytes(data)
        subscriber = Subscriber(tmp_path)
        subscriber.next(0.0)  # what it is pointed to it loads, or passes over with a warning
        assert len(refusal(lambda: read_pointer(latest))) < 1000
