"""Hashes against another implementation of MurmurHash3, and ids against the published formula."""

from __future__ import annotations

import math
import re
from typing import Any

import mmh3
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.published_ids import published_cross, published_id

from stream_ctr.events.features import Hasher, hash_ids, mix64, murmur3
from stream_ctr.events.field import Field

FIELDS = (Field("app", "categorical"), Field("age", "numeric"))
MISSING = b"\xff"


def hashed_bytes(text: str | None) -> bytes:
    return MISSING if text is None else text.encode()


def bucket_bytes(x: float | None, octave: float = 2.0) -> bytes:
    if x is None:
        return MISSING
    bucket = np.sign(x) * np.floor(octave * np.log2(1 + np.abs(np.float64(x))))
    return str(int(bucket)).encode()


# -- hashes --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=80), st.integers(0, 2**32 - 1))
def test_murmur3_equals_another_implementation(value: bytes, seed: int) -> None:
    assert murmur3(value, seed) == mmh3.hash64(value, seed, signed=False)[0]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=20))
def test_hashes_of_ids_equal_another_implementation(ids: list[str]) -> None:
    expected = [mmh3.hash64(text.encode(), 0, signed=False)[0] for text in ids]
    assert hash_ids(pa.array(ids, pa.string())).tolist() == expected


def test_mix64_is_the_published_finaliser() -> None:
    numbers = [0, 1, 2**63, 2**64 - 1, 1234567890123456789]

    def finalised(x: int) -> int:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = ((x ^ (x >> 33)) * factor) % 2**64
        return x ^ (x >> 33)

    assert mix64(np.array(numbers, np.uint64)).tolist() == [finalised(x) for x in numbers]


# -- fields --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.text(max_size=40)), min_size=1, max_size=20),
    st.integers(0, 2**32 - 1),
)
def test_a_server_in_another_language_can_reproduce_an_id(
    values: list[str | None], seed: int
) -> None:
    hasher = Hasher(FIELDS[:1], table_bits=20, hash_seed=seed)
    try:
        column = pa.array(values, pa.string())
    except UnicodeEncodeError:  # a lone surrogate, which the decoder never returns
        return
    ids, _ = hasher.rows({"app": column})
    expected = [published_id("app", hashed_bytes(value), hash_seed=seed) for value in values]
    assert ids[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("x", "bucket"),
    [(0.0, 0), (1.0, 2), (3.0, 4), (-3.0, -4), (1e6, 39), (0.3, 0), (-0.0, 0), (1e300, 1993)],
)
def test_a_number_hashes_the_text_of_its_logarithmic_bucket(x: float, bucket: int) -> None:
    assert math.copysign(1, x) * math.floor(2 * math.log2(1 + abs(x))) == bucket
    ids, _ = Hasher(FIELDS[1:], table_bits=20).rows({"age": pa.array([x])})
    assert ids[0, 0] == published_id("age", str(bucket).encode())


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), max_size=20),
    st.sampled_from([0.5, 2.0, 64.0]),
)
def test_a_number_that_occurs_twice_hashes_the_same_text_both_times(
    numbers: list[float | None], octave: float
) -> None:
    hasher = Hasher(FIELDS[1:], table_bits=20, buckets_per_octave=octave)
    ids, _ = hasher.rows({"age": pa.array(numbers * 2, pa.float64())})
    expected = [published_id("age", bucket_bytes(x, octave)) for x in numbers * 2]
    assert ids[:, 0].tolist() == expected


def test_a_missing_number_has_a_row_of_its_own() -> None:
    column = pa.array([None, 0.0, 5.0], pa.float64())
    ids, _ = Hasher(FIELDS[1:], table_bits=20).rows({"age": column})
    assert ids[0, 0] == published_id("age", MISSING)
    assert len(set(ids[:, 0].tolist())) == 3


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("value", [2.5, -3.0, 1.0]), ("log_value", [math.log1p(2.5), -math.log1p(3.0), 1.0])],
)
def test_the_value_encodings_multiply_one_row_by_the_number(
    encoding: str, expected: list[float]
) -> None:
    hasher = Hasher(FIELDS, table_bits=20, numeric_encoding=encoding)
    ids, values = hasher.rows(
        {"app": pa.array(["a", "a", "a"]), "age": pa.array([2.5, -3.0, None], pa.float64())}
    )
    assert hasher.value_fields == [1]
    assert ids[:2, 1].tolist() == [published_id("age", b"value")] * 2
    assert ids[2, 1] == published_id("age", MISSING)
    assert np.allclose(values[:, 0], expected)


def test_the_same_value_in_two_fields_has_two_rows() -> None:
    hasher = Hasher([Field("a", "categorical"), Field("b", "categorical")], table_bits=20)
    ids, _ = hasher.rows({"a": pa.array(["x"]), "b": pa.array(["x"])})
    assert ids[0, 0] != ids[0, 1]


def test_slices_and_empty_columns_hash_like_their_copies() -> None:
    column = pa.array(["zero", "one", None, "three", ""])
    copied_ids = hash_ids(pa.array(["one", "three", ""]))
    assert hash_ids(column[1:].drop_null()).tolist() == copied_ids.tolist()
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
def test_a_dictionary_hashes_like_its_words(words: list[str], numbers: list[int]) -> None:
    indices = [None if i < 0 or i >= len(words) else i for i in numbers]
    coded = pa.DictionaryArray.from_arrays(
        pa.array(indices, pa.int32()), pa.array(words, pa.string())
    )
    hasher = Hasher(FIELDS[:1], table_bits=20)
    plain = coded.cast(pa.string())
    assert hasher.rows({"app": coded})[0].tolist() == hasher.rows({"app": plain})[0].tolist()


EDGES = (0.1, 0.25, 0.5, 0.9)


def fitted_bucket(x: float, octave: float = 2.0) -> int:
    """Return the bucket of x between EDGES, by the formula that is published."""
    width = EDGES[-1] - EDGES[0]
    if x < EDGES[0]:
        return -math.floor(octave * math.log2(1 + (EDGES[0] - x) / width))
    if x >= EDGES[-1]:
        return len(EDGES) + math.floor(octave * math.log2(1 + (x - EDGES[-1]) / width))
    return sum(edge <= x for edge in EDGES)


@pytest.mark.parametrize(
    ("x", "bucket"),
    [(0.0, 0), (0.1, 1), (0.24, 1), (0.25, 2), (0.89, 3), (0.9, 4), (1.0, 4), (2.0, 6), (-5.0, -5)],
)
def test_a_number_with_edges_hashes_the_text_of_its_bucket(x: float, bucket: int) -> None:
    assert fitted_bucket(x) == bucket
    hasher = Hasher(FIELDS[1:], table_bits=20, bucket_edges={"age": EDGES})
    ids, _ = hasher.rows({"age": pa.array([x, None])})
    assert ids[:, 0].tolist() == [
        published_id("age", str(bucket).encode()),
        published_id("age", MISSING),
    ]


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-1e300, 1e300)), max_size=20))
def test_a_server_in_another_language_can_reproduce_an_id_between_edges(
    numbers: list[float | None],
) -> None:
    hasher = Hasher(FIELDS[1:], table_bits=20, bucket_edges={"age": EDGES})
    ids, _ = hasher.rows({"age": pa.array(numbers, pa.float64())})
    texts = [MISSING if x is None else str(fitted_bucket(x)).encode() for x in numbers]
    assert ids[:, 0].tolist() == [published_id("age", text) for text in texts]


def test_the_largest_numbers_have_a_bucket_at_the_closest_edges() -> None:
    close = (0.0, 5e-324)
    hasher = Hasher(FIELDS[1:], table_bits=31, bucket_edges={"age": close})
    ids, _ = hasher.rows({"age": pa.array([-1.7e308, 1.7e308])})
    assert ids[:, 0].tolist() == [
        published_id("age", text, bits=31) for text in (b"-2048", b"2050")
    ]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("value", [1.0, -0.5, -4.0, 4.0, 1.0]),
        ("log_value", [math.log(3), -math.log(2), -4.0, 4.0, 1.0]),
    ],
)
def test_a_scale_divides_the_multipliers_which_are_then_cut(
    encoding: str, expected: list[float]
) -> None:
    scale = {"value": 2.0, "log_value": 1.0}[encoding]
    hasher = Hasher(
        FIELDS[1:], table_bits=20, numeric_encoding=encoding, value_scales={"age": scale}
    )
    _, values = hasher.rows({"age": pa.array([2.0, -1.0, -1e9, 1.7e308, None])})
    assert values[:, 0].tolist() == pytest.approx(expected)
    tiny = Hasher(FIELDS[1:], table_bits=20, numeric_encoding="value", value_scales={"age": 5e-324})
    assert tiny.rows({"age": pa.array([-1.7e308])})[1].tolist() == [[-4.0]]


# -- cross products ------------------------------------------------------------------------------

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
    rows: list[tuple[str | None, int | None, str | None]],
    crosses: list[tuple[str, ...]],
    seed: int,
    coded: bool,
) -> None:
    apps, ages, users = zip(*rows, strict=True)
    columns = {"app": pa.array(apps, pa.string()), "user": pa.array(users, pa.string())}
    if coded:
        columns = {name: column.dictionary_encode() for name, column in columns.items()}
    columns["age"] = pa.array(ages, pa.float64())
    hasher = Hasher(CROSSED, table_bits=20, hash_seed=seed, crosses=crosses)
    ids, values = hasher.rows(columns)
    assert values.shape == (len(rows), 0)
    expected = []
    for app, age, user in rows:
        bucket = math.copysign(math.floor(2 * math.log2(1 + abs(age or 0))), age or 0)
        hashed = {
            "app": hashed_bytes(app),
            "age": MISSING if age is None else str(int(bucket)).encode(),
            "user": hashed_bytes(user),
        }
        expected.append(
            [
                *(published_id(name, value, hash_seed=seed) for name, value in hashed.items()),
                *(
                    published_cross([(name, hashed[name]) for name in names], hash_seed=seed)
                    for names in crosses
                ),
            ]
        )
    assert ids.tolist() == expected


def test_cross_products_come_after_the_fields_whose_ids_stay_the_same() -> None:
    columns = {
        "app": pa.array(["a", None]),
        "age": pa.array([2.5, None], pa.float64()),
        "user": pa.array(["u", "v"]),
    }
    for encoding in ("buckets", "value"):
        options: dict[str, Any] = {"table_bits": 20, "numeric_encoding": encoding}
        plain, plain_values = Hasher(CROSSED, **options).rows(columns)
        crossed, values = Hasher(CROSSED, **options, crosses=[("user", "app")]).rows(columns)
        assert crossed[:, :3].tolist() == plain.tolist()
        assert values.tolist() == plain_values.tolist()
    hasher = Hasher(CROSSED, table_bits=20, crosses=[("user", "app")])
    assert hasher.rows({name: column[:0] for name, column in columns.items()})[0].shape == (0, 4)


def test_cross_products_whose_joined_names_look_alike_have_rows_of_their_own() -> None:
    fields = [Field(name, "categorical") for name in ("ab", "c", "a", "bc", "*", "ab*c")]
    crosses = [
        ("ab", "c"),
        ("a", "bc"),
        ("c", "ab"),
        ("*", "ab*c"),
        ("ab*c", "*"),
        ("*", "ab", "c"),
    ]
    hasher = Hasher(fields, table_bits=30, crosses=crosses)
    ids, _ = hasher.rows({field.name: pa.array(["x"]) for field in fields})
    assert len(set(ids[0].tolist())) == len(fields) + len(crosses)


@pytest.mark.parametrize(
    ("names", "encoding", "message"),
    [
        (
            ("app", "usr"),
            "buckets",
            "'app*usr' has 'usr', which is not a field; did you mean 'user'",
        ),
        (
            ("app", "age"),
            "value",
            "'app*age' has the number 'age', which has one row with numeric_encoding = 'value'",
        ),
    ],
)
def test_a_member_that_cannot_be_crossed_is_named(
    names: tuple[str, ...], encoding: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Hasher(CROSSED, table_bits=20, numeric_encoding=encoding, crosses=[names])
