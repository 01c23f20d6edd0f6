"""A contract decodes completely, or the reason is damage, or the version that wrote it is newer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Struct, UnsetType

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots.contract import NewerFormat, OlderFormat, decode


class Inner(Struct, frozen=True, forbid_unknown_fields=True):
    x: int = 0


class Document(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: int = 3
    inner: Inner = Inner()
    named: dict[str, Inner] = {}
    free: dict[str, Any] = {}
    optional: int | UnsetType = UNSET


WHOLE: dict[str, Any] = {
    "format": 3,
    "inner": {"x": 1},
    "named": {"a": {"x": 2}},
    "free": {"x": {"y": [{}]}},
}


def read(data: bytes) -> Document:
    return decode(data, Document, newest=3, name="document.json")


def test_a_complete_document_is_decoded() -> None:
    document = read(msgspec.json.encode(WHOLE))
    assert document.named["a"].x == 2
    assert read(msgspec.json.encode({**WHOLE, "optional": 5})).optional == 5
    assert read(msgspec.json.encode(document)) == document


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inner": {}}, r"missing required field `x` - at `\$.inner`"),
        ({"named": {"a": {}}}, r"missing required field `x` - at `\$.named.a`"),
        ({"inner": {"x": 1, "z": 1}}, r"unknown field `z` - at `\$.inner`"),
        ({"other": 1}, "unknown field `other`"),
        ({"inner": None}, r"Expected `object`, got `null` - at `\$.inner`"),
        ({"format": "3"}, r"Expected `int`, got `str` - at `\$.format`"),
        ({"format": 3.5}, r"Expected `int`, got `float` - at `\$.format`"),
        ({"format": 0}, "there is no format 0"),
        ({"format": -1}, "there is no format -1"),
    ],
)
def test_unknown_missing_and_wrong_keys_are_damage(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SnapshotError, match=f"document.json is damaged: .*{reason}") as caught:
        read(msgspec.json.encode({**WHOLE, **change}))
    assert not isinstance(caught.value, NewerFormat)


@pytest.mark.parametrize("missing", WHOLE)
def test_a_missing_key_is_damage_although_the_type_has_a_default(missing: str) -> None:
    rest = {name: value for name, value in WHOLE.items() if name != missing}
    with pytest.raises(SnapshotError, match=f"is damaged: .*missing required field `{missing}`"):
        read(msgspec.json.encode(rest))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'{"format": 3',
        b'{"format": 4, "x',
        b"\xff\xfe",
        b'{"format": 3, "free": {"a": "\xff"}}',
        b'{"format": 3, "free": {"a": "\\ud800"}}',
        b'{"format": NaN}',
        b"[" * 200_000,
        b'{"format": 3, "free": {"a": ' + b"[" * 200_000,
        b'{"format": 3, "free": ' + b'{"a": ' * 200_000 + b"1" + b"}" * 200_001,
        b'{"format": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda data: data[:24].decode("latin-1"),
)
def test_bytes_that_are_not_the_document_are_damage(data: bytes) -> None:
    with pytest.raises(SnapshotError, match=r"document\.json is damaged: ") as caught:
        read(data)
    assert not isinstance(caught.value, NewerFormat)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("rest", ["", ', "inner": 7', ', "wonder": {"x": []}'])
def test_an_older_format_is_reported_whatever_else_the_document_holds(rest: str) -> None:
    with pytest.raises(
        OlderFormat,
        match=r"^document\.json has format 2, which an earlier version of stream-ctr wrote, and "
        r"this version reads format 3: go on with that version, or begin anew with another state",
    ):
        read(f'{{"format": 2{rest}}}'.encode())


@pytest.mark.parametrize("newer", [4, 2**63, 10**400])
def test_a_newer_format_is_reported_whatever_else_the_document_holds(newer: int) -> None:
    for rest in ("", ', "inner": 7', ', "wonder": {"x": []}'):
        with pytest.raises(
            NewerFormat,
            match=r"^document\.json has format \d+(\.\.\.)?, and this version of stream-ctr reads "
            "formats up to 3: install the version that wrote it$",
        ):
            read(f'{{"format": {newer}{rest}}}'.encode())
