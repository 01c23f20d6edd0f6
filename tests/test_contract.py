"""A contract decodes completely and unchanged, or is damage, or of another version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Struct, UnsetType
from support.manifests import write_snapshot
from support.reliability import Outcome

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import lineage, manifest, pointer, snapshot
from stream_ctr.snapshots.contract import NewerFormat, OlderFormat, decode, encode, seal
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.snapshots.pointer import Pointer, encode_pointer, pointer_for, write_pointer


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


def read_sealed(document: object) -> Document:
    return read(seal(msgspec.json.encode(document)))


def test_a_complete_document_is_decoded() -> None:
    document = read_sealed(WHOLE)
    assert document.named["a"].x == 2
    assert read_sealed({**WHOLE, "optional": 5}).optional == 5
    for indent in (1, None):
        assert read(encode(document, indent=indent)) == document


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
        read_sealed({**WHOLE, **change})
    assert not isinstance(caught.value, NewerFormat)


@pytest.mark.parametrize("missing", WHOLE)
def test_a_missing_key_is_damage_although_the_type_has_a_default(missing: str) -> None:
    rest = {name: value for name, value in WHOLE.items() if name != missing}
    with pytest.raises(SnapshotError, match=f"is damaged: .*missing required field `{missing}`"):
        read_sealed(rest)


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
        seal(b'{"format": 3, "free": {"a": ' + b"[" * 200_000 + b"}"),
        b'{"format": 4}',
        seal(b'{"format": 3}').replace(b"3", b"4", 1),
        seal(b'{"format": 3}').replace(b"3", b"2", 1),
    ],
    ids=lambda data: data[:24].decode("latin-1"),
)
def test_bytes_that_are_not_the_document_are_damage(data: bytes) -> None:
    with pytest.raises(SnapshotError, match=r"document\.json is damaged: ") as caught:
        read(data)
    assert type(caught.value) is SnapshotError
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
def test_a_newer_format_is_reported_whatever_else_the_sealed_document_holds(newer: int) -> None:
    for rest in ("", ', "inner": 7', ', "wonder": {"x": []}'):
        with pytest.raises(
            NewerFormat,
            match=r"^document\.json has format \d+(\.\.\.)?, and this version of stream-ctr reads "
            "formats up to 3: install the version that wrote it$",
        ):
            read(seal(f'{{"format": {newer}{rest}}}'.encode()))


@pytest.mark.fault(
    20, injected="every single bit of manifest.json, latest.json and run.json flipped"
)
@pytest.mark.parametrize("name", ["manifest.json", "latest.json", "a line of a topic", "run.json"])
def test_every_flipped_bit_of_a_document_is_damage(
    tmp_path: Path, name: str, outcome: Outcome
) -> None:
    data, contract, newest = documents(tmp_path)[name]
    assert decode(data, contract, newest=newest, name=name)
    flips = 0
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(SnapshotError) as caught:
                decode(bytes(flipped), contract, newest=newest, name=name)
            assert type(caught.value) is SnapshotError, (position, bit)
            flips += 1
    outcome(f"all {flips:,} are found: damage, never another version", times=flips)


def documents(root: Path) -> dict[str, tuple[bytes, type[Struct], int]]:
    path = write_snapshot(root / "snapshots")
    published = pointer_for(path, snapshot.verify(path))
    write_pointer(root / "latest.json", published)
    lineage.run_of(root)
    return {
        "manifest.json": ((path / "manifest.json").read_bytes(), Manifest, manifest.FORMAT),
        "latest.json": ((root / "latest.json").read_bytes(), Pointer, pointer.FORMAT),
        "a line of a topic": (encode_pointer(published), Pointer, pointer.FORMAT),
        "run.json": ((root / "run.json").read_bytes(), lineage.RunFile, lineage.FORMAT),
    }


def test_a_document_that_lost_its_end_is_damage(tmp_path: Path) -> None:
    data, contract, newest = documents(tmp_path)["manifest.json"]
    for end in range(len(data) - 2):
        with pytest.raises(SnapshotError, match="is damaged"):
            decode(data[:end], contract, newest=newest, name="manifest.json")
