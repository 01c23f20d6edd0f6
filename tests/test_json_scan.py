"""The JSON scanner reads every record that it passes as the strict parser does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from support.event_records import FIELDS, GOOD, T, as_values, features, record
from support.fuzzing import StrictDecoder, fuzz

from stream_ctr.events import json_scan
from stream_ctr.events.arrow_columns import byte_spans
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.field import Field
from stream_ctr.events.json_events import JsonReader
from stream_ctr.events.json_scan import MemberSpans


def read_by_both(records: list[bytes | None], fields: tuple[Field, ...] = FIELDS) -> dict[str, Any]:
    """Return the decoded events, after a check that the strict parser reads the same ones."""
    array = pa.array(records, pa.large_binary())
    read = as_values(Decoder(fields).decode(array))
    assert read == as_values(StrictDecoder(fields).decode(array))
    return read


# -- generated records ---------------------------------------------------------------------------

NUMBERS = st.one_of(
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
STRINGS = st.one_of(
    st.text(max_size=6).map(json.dumps),
    st.from_regex(
        r'"(\\[\\"/bfnrtux]|\\u[dD0aF][89cf0][0-9a-fA-F]{2}'
        r'|[ -!#-\[\]-~]|[\x00-\x1f]|é|\U0001f600){0,4}"',
        fullmatch=True,
    ),
)
SPACES = st.sampled_from(["", "", "", " ", "\n\t", "\r", "\x0b"])
SCALARS = st.one_of(
    NUMBERS, STRINGS, st.sampled_from(["null", "true", "false", "nul", "truee", "{}", "[]"])
)


def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Return a strategy of arrays and objects of these values, and of malformed arrays."""
    members = st.tuples(STRINGS, SPACES, inner).map(lambda m: f"{m[0]}{m[1]}:{m[1]}{m[2]}")
    return st.one_of(
        st.tuples(SPACES, st.lists(inner, max_size=3)).map(
            lambda p: f"[{p[0]}{f'{p[0]},'.join(p[1])}{p[0]}]"
        ),
        st.tuples(SPACES, st.lists(members, max_size=3)).map(
            lambda p: f"{{{p[0]}{f'{p[0]},'.join(p[1])}{p[0]}}}"
        ),
        inner.map(lambda text: f"[{text},]"),
    )


VALUES = st.recursive(SCALARS, containers, max_leaves=5)
NAMES = st.sampled_from(['"app"', '"age"', '"x"', '"a\\u0070p"', '"ag"', '"kind"', '"time"', '""'])
TOP_NAMES = st.sampled_from(
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


def test_any_value_in_any_place_is_read_as_by_the_strict_parser(full: bool) -> None:
    @fuzz(
        full,
        300,
        st.lists(st.tuples(NAMES, VALUES), max_size=4),
        st.lists(st.tuples(TOP_NAMES, VALUES), max_size=3),
        SPACES,
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
        members = ",".join([*others, *usual] if first else [*usual, *others])
        document = f"{space}{{{members}}}{space}"
        read_by_both([GOOD, document.encode("utf-8", "surrogatepass"), GOOD])


@pytest.mark.slow
def test_numbers_are_rounded_as_by_the_strict_parser(full: bool) -> None:
    @fuzz(full, 300, st.lists(NUMBERS, min_size=1, max_size=20))
    def check(texts: list[str]) -> None:
        read_by_both([GOOD.replace(b"31", text.encode()) for text in texts])
        read_by_both([GOOD.replace(b'"maps"', text.encode()) for text in texts])
        read_by_both([GOOD.replace(str(T).encode(), text.encode()) for text in texts])


@pytest.mark.slow
def test_times_are_read_as_by_the_strict_parser(full: bool) -> None:
    part = st.integers(0, 70).map("{:02d}".format)
    texts = st.one_of(
        st.builds(
            "{}-{}-{}{}{}:{}:{}{}{}".format,
            st.sampled_from(["2025", "1969", "1970", "2099", "2300", "0001"]),
            part,
            part,
            st.sampled_from(["T", " ", "t", ""]),
            part,
            part,
            part,
            st.sampled_from(["", ".5", ".123456789", ".1234567891", "."]),
            st.sampled_from(["Z", "+01:00", "-23:59", "+24:00", "", "z", "+0100"]),
        ),
        st.datetimes().map(lambda moment: f"{moment.isoformat()}Z"),
    )

    @fuzz(full, 300, st.lists(texts, min_size=1, max_size=10))
    def check(times: list[str]) -> None:
        read_by_both([record(time=time) for time in times])


def test_members_in_any_order_with_some_left_out_are_found(full: bool) -> None:
    fields = tuple(
        Field(f"f{i}" if i % 3 else f"n{i}", "categorical" if i % 3 else "numeric")
        for i in range(12)
    )
    names = [field.name for field in fields] + ["f", "f111", "é"]

    @fuzz(
        full,
        100,
        st.lists(
            st.tuples(st.permutations(names), st.integers(0, len(names))), min_size=1, max_size=8
        ),
    )
    def check(orders: list[tuple[list[str], int]]) -> None:
        documents = [{name: i for i, name in enumerate(order[:kept])} for order, kept in orders]
        read = read_by_both([record(features=document) for document in documents], fields)
        expected = {name: [document.get(name) for document in documents] for name in names[:12]}
        assert {
            name: [None if value is None else int(value) for value in column]
            for name, column in read["features"].items()
        } == expected


# -- chosen records ------------------------------------------------------------------------------

NEARLY_GOOD = [
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


@pytest.mark.parametrize("value", NEARLY_GOOD)
def test_a_nearly_good_record_among_good_ones_is_read_as_by_the_strict_parser(
    value: bytes,
) -> None:
    read_by_both([GOOD, GOOD, value, GOOD])


def scan(*records: bytes) -> tuple[bytes, MemberSpans]:
    """Return the bytes of the records together, and what the scanner finds in them."""
    reader = JsonReader(FIELDS, max_record_bytes=1 << 20)
    spans = byte_spans(pa.array(records, pa.large_binary()))
    found = MemberSpans.empty(len(records), json_scan.FIRST_FEATURE + len(FIELDS))
    json_scan.scan(spans, reader._members, found)
    return b"".join(records), found


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        (GOOD, True),
        (b" " + GOOD + b"\r\n", True),
        (b"{}", True),
        (b'{"x":[{"y":[]},1,"z",null,true]}', True),
        (GOOD.replace(b"maps", b"\\u00e9\\n"), True),
        (GOOD.replace(b"maps", b"\\ud83d\\ude00"), False),  # a pair of surrogates, which is good
        (GOOD.replace(b'"app"', b'"\\u0061pp"'), False),  # a name with escapes, which is good
        (GOOD.replace(b'"age":31', b'"age":1,"age":31'), False),  # the last counts
        (features(age=1).replace(b": 1}", b": " + b"1" * 201 + b"}"), False),
        (features(age=[1]), False),
        (GOOD + b"x", False),
        (b"[]", False),
        (b'{"x":' + b"[" * 255 + b"]" * 255 + b"}", True),
        (b'{"x":' + b"[" * 256 + b"]" * 256 + b"}", False),
    ],
)
def test_a_record_passes_only_if_the_scanner_vouches_for_it(value: bytes, passes: bool) -> None:
    _, found = scan(GOOD, value, GOOD)
    assert found.passed.tolist() == [True, passes, True]


def test_the_spans_of_values_are_found_without_quotes_and_nulls_are_absent() -> None:
    data, found = scan(GOOD, features(app="a\nb", age=None, x=1))
    assert found.passed.all()
    values = [
        [
            None if length < 0 else data[start : start + length]
            for start, length in zip(*row, strict=True)
        ]
        for row in zip(found.start.tolist(), found.length.tolist(), strict=True)
    ]
    time = str(T).encode()
    assert values == [
        [b"impression", b"a", time, None, b"", None, b"maps", b"31"],
        [b"impression", b"a", time, None, b"", None, b"a\\nb", None],
    ]
    assert found.has_unknown.tolist() == [False, True]
    assert found.has_escapes.tolist() == [False] * 6 + [True, False]


# -- values --------------------------------------------------------------------------------------


def spans_of(
    texts: list[str | None],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return texts side by side, and their starts and lengths, -1 for None."""
    data = np.frombuffer("".join(text or "" for text in texts).encode() + b"!", np.uint8)
    length = np.array([-1 if text is None else len(text.encode()) for text in texts], np.int32)
    start = np.cumsum([0, *np.maximum(length, 0)])[:-1]
    return data, start, length


def test_numbers_of_up_to_15_digits_are_exact_and_others_are_left_to_the_caller() -> None:
    texts = ["0", "-0", "-0.0", "31", "-1.5e3", "123456789012345", "0.1", "1e22", "1E-22", None]
    numbers, inexact = json_scan.parse_numbers(*spans_of(texts))
    assert not inexact.any()
    assert np.isnan(numbers[-1])
    expected = np.array([float(text) for text in texts[:-1] if text is not None])
    expected[1] = 0.0  # the integer -0 is 0, as for the strict parser
    assert numbers[:-1].tobytes() == expected.tobytes()
    _, inexact = json_scan.parse_numbers(*spans_of(["1234567890123456", "1e23", "1e-23", "1e99"]))
    assert inexact.all()


def test_integers_of_up_to_18_digits_are_read_and_absent_ones_are_0() -> None:
    texts = ["0", "-7", None, "9" * 18, "-" + "9" * 18]
    expected = [0, -7, 0, 10**18 - 1, 1 - 10**18]
    assert json_scan.parse_integers(*spans_of(texts)).tolist() == expected


def test_texts_are_copied_side_by_side() -> None:
    data, start, length = spans_of(["maps", None, "", "é"])
    offsets, text = json_scan.copy_texts(data, start[::-1].copy(), length[::-1].copy())
    assert offsets.tolist() == [0, 2, 2, 2, 6]
    assert text.tobytes().decode() == "émaps"
