"""Hashing against an independent MurmurHash3, and the published recipe for ids."""

from __future__ import annotations

import math
import re

import mmh3
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.published_ids import published_cross, published_id

from stream_ctr.events.features import Hasher, hash_ids, murmur3
from stream_ctr.events.field import Field

FIELDS = (Field("app", "categorical"), Field("age", "numeric"))


@settings(deadline=None)
@given(st.binary(max_size=80), st.integers(0, 2**32 - 1))
def test_murmur3_equals_another_implementation(value, seed):
    assert murmur3(value, seed) == mmh3.hash64(value, seed, signed=False)[0]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.text(max_size=40)), min_size=1, max_size=20),
    st.integers(0, 2**32 - 1),
)
def test_a_server_in_another_language_can_reproduce_an_id(values, seed):
    hasher = Hasher(FIELDS[:1], table_bits=20, hash_seed=seed)
    try:
        column = pa.array(values, pa.string())
    except UnicodeEncodeError:  # a lone surrogate is no UTF-8 and does not come out of the decoder
        return
    ids, _ = hasher.rows({"app": column})
    expected = [
        published_id("app", b"\xff" if v is None else v.encode(), hash_seed=seed) for v in values
    ]
    assert ids[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("x", "bucket"),
    [(0.0, 0), (1.0, 2), (3.0, 4), (-3.0, -4), (1e6, 39), (0.3, 0), (-0.0, 0), (1e300, 1993)],
)
def test_a_number_hashes_the_text_of_its_logarithmic_bucket(x, bucket):
    assert math.copysign(1, x) * math.floor(2 * math.log2(1 + abs(x))) == bucket
    ids, _ = Hasher(FIELDS[1:], table_bits=20).rows({"age": pa.array([x])})
    assert ids[0, 0] == published_id("age", str(bucket).encode())


def test_a_missing_number_has_a_row_of_its_own():
    ids, _ = Hasher(FIELDS[1:], table_bits=20).rows(
        {"age": pa.array([None, 0.0, 5.0], pa.float64())}
    )
    assert ids[0, 0] == published_id("age", b"\xff")
    assert len(set(ids[:, 0].tolist())) == 3


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("value", [2.5, -3.0, 1.0]), ("log_value", [math.log1p(2.5), -math.log1p(3.0), 1.0])],
)
def test_the_value_encodings_multiply_one_row_by_the_number(encoding, expected):
    hasher = Hasher(FIELDS, table_bits=20, numeric_encoding=encoding)
    ids, values = hasher.rows(
        {"app": pa.array(["a", "a", "a"]), "age": pa.array([2.5, -3.0, None], pa.float64())}
    )
    assert hasher.value_fields == [1]
    assert ids[:2, 1].tolist() == [published_id("age", b"value")] * 2
    assert ids[2, 1] == published_id("age", b"\xff")
    assert np.allclose(values[:, 0], expected)


def test_the_same_value_in_two_fields_has_two_rows():
    ids, _ = Hasher([Field("a", "categorical"), Field("b", "categorical")], table_bits=20).rows(
        {"a": pa.array(["x"]), "b": pa.array(["x"])}
    )
    assert ids[0, 0] != ids[0, 1]


def test_slices_and_empty_columns_hash_like_their_copies():
    column = pa.array(["zero", "one", None, "three", ""])
    assert (
        hash_ids(column[1:].drop_null()).tolist()
        == hash_ids(pa.array(["one", "three", ""])).tolist()
    )
    hasher = Hasher(FIELDS[:1], table_bits=12)
    sliced, _ = hasher.rows({"app": column.slice(2, 3)})
    copied, _ = hasher.rows({"app": pa.array([None, "three", ""], pa.string())})
    assert sliced.tolist() == copied.tolist()
    assert hasher.rows({"app": pa.array([], pa.string())})[0].shape == (0, 1)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "maps", "\u00e9", "", "a word of more than sixteen bytes"]),
        max_size=5,
    ),
    st.lists(st.integers(-1, 4), max_size=20),
)
def test_a_dictionary_hashes_like_the_words_it_stands_for(words, indices):
    indices = [None if i < 0 or i >= len(words) else i for i in indices]
    coded = pa.DictionaryArray.from_arrays(
        pa.array(indices, pa.int32()), pa.array(words, pa.string())
    )
    hasher = Hasher(FIELDS[:1], table_bits=20)
    assert (
        hasher.rows({"app": coded})[0].tolist()
        == hasher.rows({"app": coded.cast(pa.string())})[0].tolist()
    )


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), max_size=20),
    st.sampled_from([0.5, 2.0, 64.0]),
)
def test_any_number_hashes_the_text_of_its_bucket_seen_before_or_not(numbers, octave):
    ids, _ = Hasher(FIELDS[1:], table_bits=20, buckets_per_octave=octave).rows(
        {"age": pa.array(numbers * 2, pa.float64())}
    )
    expected = [
        b"\xff"
        if x is None
        else str(int(np.sign(x) * np.floor(octave * np.log2(1 + np.abs(np.float64(x)))))).encode()
        for x in numbers * 2
    ]
    assert ids[:, 0].tolist() == [published_id("age", text) for text in expected]


CROSSED = (*FIELDS, Field("user", "categorical"))
TEXTS = st.one_of(st.none(), st.sampled_from(["", "maps", "a word of more than sixteen bytes"]))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(TEXTS, st.one_of(st.none(), st.integers(-(10**6), 10**6)), TEXTS),
        min_size=1,
        max_size=10,
    ),
    st.lists(
        st.permutations(["app", "age", "user"]).flatmap(
            lambda names: st.integers(2, 3).map(lambda n: tuple(names[:n]))
        ),
        max_size=3,
    ),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_a_server_in_another_language_can_reproduce_the_id_of_a_cross_product(
    rows, crosses, seed, coded
):
    hashed = [
        {
            "app": b"\xff" if app is None else app.encode(),
            "age": b"\xff"
            if age is None
            else str(int(math.copysign(math.floor(2 * math.log2(1 + abs(age))), age))).encode(),
            "user": b"\xff" if user is None else user.encode(),
        }
        for app, age, user in rows
    ]
    apps, ages, users = zip(*rows, strict=True)
    texts = {
        name: pa.array(column, pa.string()) for name, column in (("app", apps), ("user", users))
    }
    columns = {
        name: column.dictionary_encode() if coded else column for name, column in texts.items()
    } | {"age": pa.array(ages, pa.float64())}
    hasher = Hasher(CROSSED, table_bits=20, hash_seed=seed, crosses=crosses)
    ids, values = hasher.rows(columns)
    assert values.shape == (len(rows), 0)
    expected = [
        [*(published_id(name, row[name], hash_seed=seed) for name in ("app", "age", "user"))]
        + [
            published_cross([(name, row[name]) for name in names], hash_seed=seed)
            for names in crosses
        ]
        for row in hashed
    ]
    assert ids.tolist() == expected


def test_cross_products_stand_behind_fields_whose_ids_stay_what_they_were():
    columns = {
        "app": pa.array(["a", None]),
        "age": pa.array([2.5, None], pa.float64()),
        "user": pa.array(["u", "v"]),
    }
    for encoding in ("buckets", "value"):
        plain, plain_values = Hasher(CROSSED, table_bits=20, numeric_encoding=encoding).rows(
            columns
        )
        crossed, values = Hasher(
            CROSSED, table_bits=20, numeric_encoding=encoding, crosses=[("user", "app")]
        ).rows(columns)
        assert crossed[:, :3].tolist() == plain.tolist()
        assert values.tolist() == plain_values.tolist()
    hasher = Hasher(CROSSED, table_bits=20, crosses=[("user", "app")])
    assert hasher.rows({name: column[:0] for name, column in columns.items()})[0].shape == (0, 4)


def test_cross_products_whose_names_read_alike_in_a_row_have_rows_of_their_own():
    fields = [Field(name, "categorical") for name in ("ab", "c", "a", "bc", "*", "ab*c")]
    column = pa.array(["x"])
    crosses = [
        ("ab", "c"),
        ("a", "bc"),
        ("c", "ab"),
        ("*", "ab*c"),
        ("ab*c", "*"),
        ("*", "ab", "c"),
    ]
    ids, _ = Hasher(fields, table_bits=30, crosses=crosses).rows(
        {field.name: column for field in fields}
    )
    assert len(set(ids[0].tolist())) == len(fields) + len(crosses)


@pytest.mark.parametrize(
    ("names", "encoding", "message"),
    [
        (("app", "usr"), "buckets", "'app*usr' has 'usr', which is no field; did you mean 'user'"),
        (
            ("app", "age"),
            "value",
            "'app*age' has the number 'age', which has one row with numeric_encoding = 'value'",
        ),
    ],
)
def test_what_cannot_be_crossed_is_named(names, encoding, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Hasher(CROSSED, table_bits=20, numeric_encoding=encoding, crosses=[names])
