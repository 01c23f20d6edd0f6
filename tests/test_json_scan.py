"""The scanner of JSON: whatever it passes, it reads as the strict parser does, and what is usual it does not leave to it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from support.event_records import FIELDS, GOOD, T, features, record
from support.fuzzing import Strict, fuzz, told

from stream_ctr.events import json_events
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import JsonReader

numbers = st.one_of(
    st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.from_regex(r"[-+0-9.eE]{1,6}", fullmatch=True),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(2**65), 2**65).map(str),
    st.sampled_from(
        [
            "-0",
            "-0.0",
            "-0e5",
            "0e99",
            "9" * 200,
            "9" * 201,
            "9" * 199 + "e99",
            "1e-99",
            "1e0099",
            "123456789012345e22",
            "01",
        ]
    ),
)
strings = st.one_of(
    st.text(max_size=6).map(json.dumps),
    st.from_regex(
        r'"(\\[\\"/bfnrtux]|\\u[dD0aF][89cf0][0-9a-fA-F]{2}|[ -!#-\[\]-~]|[\x00-\x1f]|é|\U0001f600){0,4}"',
        fullmatch=True,
    ),
)
spaces = st.sampled_from(["", "", "", " ", "\n\t", "\r", "\x0b"])
scalars = st.one_of(
    numbers, strings, st.sampled_from(["null", "true", "false", "nul", "truee", "{}", "[]"])
)


def spelled(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Arrays and objects of these, and what is nearly one."""
    members = st.tuples(strings, spaces, inner).map(lambda m: f"{m[0]}{m[1]}:{m[1]}{m[2]}")
    return st.one_of(
        st.tuples(spaces, st.lists(inner, max_size=3)).map(
            lambda p: f"[{p[0]}{f'{p[0]},'.join(p[1])}{p[0]}]"
        ),
        st.tuples(spaces, st.lists(members, max_size=3)).map(
            lambda p: f"{{{p[0]}{f'{p[0]},'.join(p[1])}{p[0]}}}"
        ),
        inner.map(lambda text: f"[{text},]"),
    )


values = st.recursive(scalars, spelled, max_leaves=5)
names = st.sampled_from(['"app"', '"age"', '"x"', '"a\\u0070p"', '"ag"', '"kind"', '"time"', '""'])


def same(records: list[bytes | None], fields: tuple[Field, ...] = FIELDS) -> dict[str, Any]:
    array = pa.array(records, pa.large_binary())
    read = told(Decoder(fields).decode(array))
    assert read == told(Strict(fields).decode(array))
    return read


def test_a_value_of_any_spelling_in_any_place_is_read_as_by_the_strict_parser(full):
    tops = st.sampled_from(
        [
            '"kind"',
            '"impression_id"',
            '"time"',
            '"features"',
            '"true_probability"',
            '"x"',
            '"features"',
        ]
    )

    @fuzz(
        full,
        300,
        st.lists(st.tuples(names, values), max_size=4),
        st.lists(st.tuples(tops, values), max_size=3),
        spaces,
        st.booleans(),
    )
    def check(
        inner: list[tuple[str, str]], outer: list[tuple[str, str]], space: str, first: bool
    ) -> None:
        inside = f"{space},{space}".join(f"{name}{space}:{space}{value}" for name, value in inner)
        usual = [
            '"kind":"impression"',
            '"impression_id":"a"',
            f'"time":{T}',
            f'"features":{{{space}{inside}{space}}}',
        ]
        others = [f"{name}:{value}" for name, value in outer]
        document = (
            f"{space}{{{','.join([*others, *usual] if first else [*usual, *others])}}}{space}"
        )
        same([GOOD, document.encode("utf-8", "surrogatepass"), GOOD])


@pytest.mark.slow
def test_numbers_are_rounded_as_by_the_strict_parser(full):
    @fuzz(full, 300, st.lists(numbers, min_size=1, max_size=20))
    def check(texts: list[str]) -> None:
        same([GOOD.replace(b"31", text.encode()) for text in texts])
        same([GOOD.replace(b'"maps"', text.encode()) for text in texts])
        same([GOOD.replace(str(T).encode(), text.encode()) for text in texts])


@pytest.mark.slow
def test_times_are_read_as_by_the_strict_parser(full):
    part = st.integers(0, 70).map("{:02d}".format)
    texts = st.one_of(
        st.builds("{}-{}-{}{}{}:{}:{}{}{}".format, st.sampled_from(["2025", "1969", "1970", "2099", "2300", "0001"]), part, part,
                  st.sampled_from(["T", " ", "t", ""]), part, part, part, st.sampled_from(["", ".5", ".123456789", ".1234567891", "."]),
                  st.sampled_from(["Z", "+01:00", "-23:59", "+24:00", "", "z", "+0100"])),
        st.datetimes().map(lambda moment: f"{moment.isoformat()}Z"),
    )  # fmt: skip

    @fuzz(full, 300, st.lists(texts, min_size=1, max_size=10))
    def check(times: list[str]) -> None:
        same([record(time=time) for time in times])


def test_members_in_any_order_with_some_left_out_are_found(full):
    many = tuple(
        Field(f"f{i}" if i % 3 else f"n{i}", "categorical" if i % 3 else "numeric")
        for i in range(12)
    )
    names = [field.name for field in many] + ["f", "f111", "é"]

    @fuzz(
        full,
        100,
        st.lists(
            st.tuples(st.permutations(names), st.integers(0, len(names))), min_size=1, max_size=8
        ),
    )
    def check(orders: list[tuple[list[str], int]]) -> None:
        documents = [{name: i for i, name in enumerate(order[:kept])} for order, kept in orders]
        read = same([record(features=document) for document in documents], many)
        expected = {name: [document.get(name) for document in documents] for name in names[:12]}
        assert {
            name: [None if v is None else int(v) for v in column]
            for name, column in read["features"].items()
        } == expected


NEARLY = [
    *(
        GOOD.replace(b"maps", text)
        for text in (
            b"\\ud800",
            b"\\uD83D\\uDE00",
            b"\\udfff",
            b"\\ud7ff",
            b"\\u12",
            b"\\x",
            b"\\",
            b"a\tb",
            b"\xed\xa0\x80",
        )
    ),
    *(
        GOOD[:-1] + b',"x":"' + text + b'"}'
        for text in (b"\\ud8ff", b"\\u00g0", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe2\x82")
    ),
    GOOD.replace(b'"app":', b'"appx:'),
    GOOD.replace(b'"app":', b'"app:'),
    GOOD.replace(b'"app":', b'"apps":'),
    GOOD.replace(b'"app"', b'"\\u0061pp"'),
    GOOD.replace(b"31}}", b"31}"),
    GOOD.replace(b"31}}", b"31]}"),
    GOOD.replace(b"31}}", b"31,}}"),
    GOOD.replace(b"31}}", b'31,"app":"x"}}'),
    GOOD.replace(b"31}}", b"31}}}"),
]


def test_what_is_nearly_good_is_left_to_the_strict_parser_in_a_stream_of_good_ones():
    for value in NEARLY:
        same([GOOD, GOOD, value, GOOD])


USUAL = [
    GOOD,
    features(app=5, age=-1.5e3),
    features(app=True, age=None),
    features(app='quote " and \\ and é'),
    features(extra={"deep": [1, {"a": None}]}),
    record(time="2025-01-01T00:00:04.200+01:00"),
    json.dumps(json.loads(GOOD), indent=2).encode(),
    b'{"kind":"click","impression_id":"a","time":1735689600000}',
    b'{"impression_id":"a","time":1735689600000,"kind":"click","features":null,"true_probability":0.12345678901234567890}',
]


def test_what_is_usual_is_not_left_to_the_strict_parser(monkeypatch):
    def never(reader: JsonReader, value: bytes) -> None:
        raise AssertionError(value)

    monkeypatch.setattr(JsonReader, "_read_one", never)
    events, rejects = Decoder(FIELDS).decode(pa.array(USUAL, pa.large_binary()))
    assert (len(events.impressions), len(events.clicks), len(rejects)) == (7, 2, 0)
    assert events.impressions.features["app"].to_pylist()[:4] == [
        "maps",
        "5",
        "true",
        'quote " and \\ and é',
    ]
    assert events.with_unknown_fields == 1


@pytest.mark.parametrize(("rows", "most_bytes"), [(7, 1 << 20), (1000, 900)])
def test_blocks_of_bounded_rows_and_bytes_together_are_all_of_it(monkeypatch, rows, most_bytes):
    records = [features(app="m" * (i % 700)) if i % 5 else b"oops" for i in range(200)]
    whole = same(records)
    monkeypatch.setattr(json_events, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(json_events, "_BLOCK_BYTES", most_bytes)
    size = np.array([len(value) for value in records])
    blocks = json_events._blocks(np.arange(200), size)
    assert np.concatenate(blocks).tolist() == list(range(200))
    assert max(len(block) for block in blocks) <= rows
    assert max(size[block].sum() for block in blocks) < most_bytes + 800
    assert same(records) == whole
