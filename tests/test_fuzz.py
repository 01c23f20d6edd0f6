"""Mutated bytes from outside: the decoder, the readers of logs and the loader of snapshots.

Whatever the bytes are, each of them returns a result or raises an error of its own kind, with a
short and printable message.
"""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from fuzz.mutation import Mutations
from fuzz.targets import TARGETS, Target
from hypothesis import strategies as st
from support.event_records import EVENTS, FIELDS, T, as_values
from support.fuzzing import StrictDecoder, fuzz, in_memory, ipc, mutated
from support.manifests import replace_file
from support.memory_topic import topic_of
from support.reliability import Outcome
from support.sample_logs import (
    AVAZU_HEADER,
    COLUMNS,
    OBD,
    avazu_line,
    criteo_line,
    labelled_csv,
    labelled_rows,
    nested,
)

from stream_ctr.errors import DataError, SnapshotError
from stream_ctr.events.decoder import Decoder
from stream_ctr.logs.open import FORMATS, open_log
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import seal
from stream_ctr.snapshots.pointer import encode_pointer, pointer_for, read_pointer
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber

LONGEST_MESSAGE = 300
QUICK_SECONDS = 1.0
LONGEST_LOG_MESSAGE = 800


# -- the targets of make fuzz, for a moment -------------------------------------------------------


@pytest.mark.bad_input("arbitrary bytes", via="records, batches, manifests, pointers, arguments")
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_target_survives_its_seeds_and_their_mutations(
    target: Target, tmp_path: Path, outcome: Outcome
) -> None:
    check = target.start(tmp_path)
    seeds = target.seeds()
    mutations = Mutations(seeds, seed=0, tokens=target.tokens)
    ends = time.monotonic() + QUICK_SECONDS
    while seeds or time.monotonic() < ends:
        data = seeds.pop() if seeds else mutations.next()
        try:
            check(data)
        except Exception as error:
            error.add_note(f"the input: {data[:2000]!r}")
            raise
    outcome("read or refused")


# -- the decoder ---------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["impression", "click", "view", 1, None]),
        "impression_id": st.sampled_from(["a", "b", "", 5, None]),
        "time": st.one_of(st.integers(T, T + 10**6), st.just("2025-01-01T00:00:00Z"), JSON_VALUES),
        "features": st.one_of(
            st.fixed_dictionaries(
                {},
                optional={
                    "app": st.text(max_size=3) | JSON_VALUES,
                    "age": st.floats(-9, 9) | JSON_VALUES,
                },
            ),
            JSON_VALUES,
        ),
        "true_probability": st.floats(-1, 2) | JSON_VALUES,
        "x": JSON_VALUES,
    },
)
RECORDS = st.one_of(
    mutated(*EVENTS),
    DOCUMENTS.map(lambda d: json.dumps(d).encode("utf-8", "surrogatepass")),
    st.sampled_from(EVENTS),
    st.binary(max_size=20),
    st.none(),
)


def rows(read: dict[str, Any], *names: str) -> list[int]:
    """Return the rows of these impressions, clicks or rejects."""
    return [row for name in names for row, *_ in read[name]]


@pytest.mark.slow
def test_the_scanner_and_the_strict_parser_read_any_bytes_alike(full: bool) -> None:
    @fuzz(full, 300, st.lists(RECORDS, min_size=1, max_size=30))
    def check(values: list[bytes | None]) -> None:
        array = pa.array(values, pa.large_binary())
        strict = as_values(StrictDecoder(FIELDS).decode(array))
        assert as_values(Decoder(FIELDS).decode(array)) == strict
        # No record is lost or read twice.
        read = rows(strict, "impressions", "clicks", "rejects")
        assert sorted(read) == list(range(len(values)))
        for _, _, message in strict["rejects"]:
            assert message.isprintable()
            assert len(message) < LONGEST_MESSAGE


def test_the_neighbours_of_a_mutated_record_are_read_as_without_it(full: bool) -> None:
    good = [EVENTS[0]] * 40 + [EVENTS[3]] * 40

    @fuzz(full, 150, mutated(*EVENTS), st.integers(0, 80))
    def check(bad: bytes, index: int) -> None:
        values = pa.array([*good[:index], bad, *good[index:]], pa.large_binary())
        read = as_values(Decoder(FIELDS).decode(values))
        others = [row for row in rows(read, "impressions", "clicks", "rejects") if row != index]
        assert sorted(row - (row > index) for row in others) == list(range(80))
        assert set(rows(read, "rejects")) <= {index}


# -- logs on disk --------------------------------------------------------------------------------


def seeds_of_logs() -> dict[str, list[bytes]]:
    """Return small logs of every format, written in every way."""
    events = b"\n".join(EVENTS)
    flat = pa.table(COLUMNS)
    coded = flat.set_column(3, "app", flat["app"].dictionary_encode())
    criteo = "\n".join(criteo_line(str(i % 2)) for i in range(4)).encode()
    avazu = "\n".join(avazu_line(i, i % 2) for i in range(4)).encode()

    def plain_parquet(file: object) -> None:
        pa.parquet.write_table(nested(flat), file, compression="none", use_dictionary=False)

    return {
        "events": [events, gzip.compress(events), bytes(pa.Codec("zstd").compress(events))],
        "csv": [labelled_csv(4).encode(), labelled_csv(4, delimiter=";").encode()],
        "tsv": [labelled_csv(4, delimiter="\t", lineterminator="\n").encode()],
        "json": [
            json.dumps(labelled_rows(4)).encode(),
            b"\n".join(json.dumps(row).encode() for row in labelled_rows(4)),
        ],
        "criteo": [criteo],
        "avazu": [avazu, AVAZU_HEADER.encode() + b"\n" + avazu],
        "obd": [b"\n".join(OBD.read_bytes().splitlines()[:4])],
        "parquet": [
            in_memory(lambda file: pa.parquet.write_table(coded, file)),
            in_memory(plain_parquet),
        ],
        "arrow": [
            ipc(pa.ipc.new_file, flat),
            ipc(pa.ipc.new_stream, nested(coded)),
            ipc(pa.ipc.new_stream, coded),
        ],
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_a_mutated_log_is_read_or_ends_with_a_data_error(
    full: bool, format: str, tmp_path: Path
) -> None:
    seeds = seeds_of_logs()[format]
    numbers = itertools.count()

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
        for message in messages:
            assert message.isprintable()
            assert len(message) < LONGEST_LOG_MESSAGE
        path.unlink()


# -- snapshots -----------------------------------------------------------------------------------

ODD_VALUES: list[Any] = [
    *(..., None, True, -1, 0, 1, 3, 63),
    *(2**31, 2**62, 2**64, -(2**63), 10**400, 0.5, 1e308),
    *("", "x", "../../x", "\x1b[2J", "\ud800", "0" * 64),
    *([], [1], [30_000, 30_000], [["app", "categorical"]]),
    *({}, {"bytes": 1, "sha256": ""}),
]
"""Values for any place of a JSON document; `...` removes what is there."""

ROWS = [{"app": "maps", "age": 31}, {}]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return every place in a JSON document but the document itself."""
    children: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        children = list(tree.items())
    elif isinstance(tree, list):
        children = list(enumerate(tree))
    return [
        place for key, child in children for place in ((*path, key), *places(child, (*path, key)))
    ]


def changed(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a JSON document with this value in this place."""
    tree = json.loads(json.dumps(tree))
    owner = tree
    for key in place[:-1]:
        owner = owner[key]
    if value is ...:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return tree


def error_of(read: Callable[[], object]) -> str:
    """Return the message of the `SnapshotError` that this raises, empty if it raises none."""
    try:
        read()
    except SnapshotError as error:
        return str(error)
    return ""


def assert_served_or_refused(path: Path) -> None:
    """Read a snapshot in every way: each returns, or raises a `SnapshotError` that is not long.

    A model that was loaded predicts finite numbers.
    """
    for read in (
        lambda: snapshot.load(path),
        lambda: snapshot.verify(path),
        lambda: snapshot.newest(path.parent),
        lambda: assert_finite(Scorer(path, on_invalid="score")),
        lambda: assert_finite(Scorer(path, model="ftrl", on_invalid="score")),
    ):
        assert len(error_of(read)) < 1000


def unsealed(data: bytes) -> dict[str, Any]:
    """Return a document without its seal."""
    document: dict[str, Any] = json.loads(data)
    del document["sha256"]
    return document


def sealed_value(document: Any) -> bytes:
    """Return the bytes of a document with a seal that is right."""
    return seal(json.dumps(document).encode())


def assert_finite(scorer: Scorer) -> None:
    assert np.isfinite(scorer.predict(ROWS)).all()


def test_a_mutated_manifest_is_refused_or_loads(full: bool, served: Path) -> None:
    text = (served / "manifest.json").read_bytes()
    inside = json.dumps(unsealed(text)).encode()

    @fuzz(full, 100, st.one_of(mutated(text), mutated(inside).map(seal)))
    def check(data: bytes) -> None:
        (served / "manifest.json").write_bytes(data)
        assert_served_or_refused(served)


def test_a_manifest_with_an_odd_value_in_any_place_is_refused_or_loads(
    full: bool, served: Path
) -> None:
    manifest = unsealed((served / "manifest.json").read_bytes())

    @fuzz(full, 120, st.sampled_from(places(manifest)), st.sampled_from(ODD_VALUES))
    def check(place: tuple[Any, ...], value: Any) -> None:
        (served / "manifest.json").write_bytes(sealed_value(changed(manifest, place, value)))
        assert_served_or_refused(served)


def test_mutated_tensors_with_the_right_hash_are_refused_or_load(full: bool, served: Path) -> None:
    file = (served / "model.safetensors").read_bytes()
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    numbers_start = 8 + size
    numbers = st.floats(allow_nan=True, width=32).map(lambda number: np.float32(number).tobytes())

    def rebuilt(place: tuple[Any, ...], value: Any) -> bytes:
        text = json.dumps(changed(header, place, value)).encode()
        return len(text).to_bytes(8, "little") + text + file[numbers_start:]

    def with_number(where: float, number: bytes) -> bytes:
        index = int(where * ((len(file) - numbers_start) // 4))
        start = numbers_start + 4 * index
        return file[:start] + number + file[start + 4 :]

    files = st.one_of(
        mutated(file),
        mutated(file[:numbers_start]).map(lambda head: head + file[numbers_start:]),
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
        assert_served_or_refused(served)


def test_a_mutated_pointer_is_refused_or_leads_to_a_snapshot(
    full: bool, served: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = encode_pointer(pointer_for(served, snapshot.verify(served)))
    pointer = unsealed(whole)
    latest = tmp_path / "latest.json"
    elsewhere = [
        f"{place}/{served.name}"
        for place in ("/" + "x" * 5000, "/a\0b", "/\ud800", "/dev/null", "//", tmp_path)
    ]
    values = st.sampled_from([*ODD_VALUES, *elsewhere])
    odd = st.builds(
        changed, st.just(pointer), st.sampled_from([("path",), *places(pointer)]), values
    )

    inside = json.dumps(pointer).encode()
    documents = st.one_of(mutated(whole), mutated(inside).map(seal), odd.map(sealed_value))

    @fuzz(full, 200, documents)
    def check(data: bytes) -> None:
        latest.write_bytes(data)
        for source in (tmp_path, TopicPointers(topic_of(data).reader())):
            subscriber = Subscriber(source)
            subscriber.next(0.0)  # loads the snapshot, or counts why not
            assert set(subscriber.failures) <= {"pointer", "snapshot"}
        assert not [record for record in caplog.records if record.exc_info], "unexpected"
        caplog.clear()
        assert len(error_of(lambda: read_pointer(latest))) < 1000
