"""The pointer leads to a snapshot, is replaced in one step, and is refused if anything is wrong."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.manifests import make_newer, manifest, sealed, write_snapshot
from support.snapshots import TENSORS, crash_at_each_step, equal_tensors

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.pointer import (
    Pointer,
    decode_pointer,
    encode_pointer,
    pointer_for,
    read_pointer,
    write_pointer,
)

GOOD: dict[str, Any] = {
    "format": 4,
    "snapshot": "1",
    "path": "/snapshots/1",
    "manifest_sha256": "0" * 64,
    "run": "0" * 31 + "1",
    "replaces": ["0" * 31 + "a"],
    "model": "default",
    "epoch": 3,
    "sequence": 7,
    "examples": 1000,
    "event_time_ms": 1_735_726_500_000,
    "created_ms": 1_735_726_501_000,
    "delta": None,
    "url": "",
    "signature": "",
}


def pointer(**changes: Any) -> Pointer:
    return decode_pointer(sealed({**GOOD, **changes}))


def sealed_line(document: dict[str, Any]) -> bytes:
    body = json.dumps(document, separators=(",", ":"))[:-1]
    return f'{body},"sha256":"{sha256(body.encode()).hexdigest()}"}}'.encode()


def test_a_pointer_leads_to_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_snapshot(Path("snapshots"), TENSORS, sequence=7)
    described = snapshot.verify(path)
    written = pointer_for(path, described)
    write_pointer(tmp_path / "latest.json", written)
    found = read_pointer(tmp_path / "latest.json")
    assert found == written
    for name in ("run", "model", "epoch", "sequence", "examples", "event_time_ms", "created_ms"):
        assert getattr(found, name) == getattr(described, name)
    monkeypatch.chdir("/")
    loaded = snapshot.load(Path(written.path), manifest_sha256=written.manifest_sha256)
    assert equal_tensors(loaded[1], TENSORS)


def test_a_pointer_may_have_a_later_epoch_than_its_snapshot(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, epoch=3)
    assert pointer_for(path, snapshot.verify(path)).epoch == 3
    assert pointer_for(path, snapshot.verify(path), epoch=9).epoch == 9


def test_pointers_rank_by_epoch_and_then_by_sequence() -> None:
    ranked = [pointer(epoch=1, sequence=9), pointer(epoch=2, sequence=1), pointer(epoch=2)]
    assert sorted(ranked, key=lambda each: each.rank) == ranked


def test_a_pointer_survives_its_encoding_as_one_line() -> None:
    line = encode_pointer(pointer())
    assert b"\n" not in line
    assert line == sealed_line(GOOD)
    assert decode_pointer(line) == pointer()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 9}, "pointer has format 9, and this version of stream-ctr reads formats up"),
        ({"format": 0}, "there is no format 0"),
        ({"format": True}, r"Expected `int`, got `bool` - at `\$.format`"),
        ({"epoch": True}, r"Expected `int`, got `bool` - at `\$.epoch`"),
        ({"epoch": "1"}, r"Expected `int`, got `str` - at `\$.epoch`"),
        ({"epoch": -1}, r"Expected `int` >= 0 - at `\$.epoch`"),
        ({"epoch": 2**63}, r"at `\$.epoch`"),
        ({"path": "snapshots/1"}, "must be absolute"),
        ({"path": "/snapshots/2"}, "must be absolute and end in the snapshot's name '1'"),
        ({"snapshot": "..", "path": "/snapshots/.."}, "not a plain name"),
        ({"snapshot": "tmp-1", "path": "/snapshots/tmp-1"}, "marks unfinished ones"),
        ({"manifest_sha256": "f00"}, r"matching regex .*\$.manifest_sha256"),
        ({"manifest_sha256": "0" * 64 + "\n"}, r"length <= 64 - at `\$.manifest_sha256`"),
        ({"run": "0" * 31}, r"matching regex .*\$.run"),
        ({"run": "0" * 32 + "\n"}, r"length <= 32 - at `\$.run`"),
        ({"run": "A" * 32}, r"matching regex .*\$.run"),
        ({"replaces": ["x"]}, r"matching regex .*\$.replaces"),
        ({"format": 1}, "has format 1, which an earlier version of stream-ctr wrote"),
        ({"new": 1}, "unknown field `new`"),
        ({"model": None}, r"Expected `str`, got `null` - at `\$.model`"),
    ],
)
def test_a_pointer_with_a_wrong_field_is_refused(change: dict[str, Any], reason: str) -> None:
    assert encode_pointer(pointer()) == sealed_line(GOOD)
    with pytest.raises(SnapshotError, match=reason):
        pointer(**change)


@pytest.mark.parametrize("missing", GOOD)
def test_a_pointer_without_one_of_its_keys_is_damaged(missing: str) -> None:
    rest = {name: value for name, value in GOOD.items() if name != missing}
    with pytest.raises(SnapshotError, match=f"is damaged: .*missing required field `{missing}`"):
        decode_pointer(sealed(rest))


def test_numbers_that_do_not_fit_a_pointer_are_refused_by_field(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, event_time_ms=-1)
    with pytest.raises(SnapshotError, match=r"Expected `int` >= 0 - at `\$.event_time_ms`"):
        pointer_for(path, snapshot.verify(path))


def test_a_missing_pointer_file_is_none_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    latest = tmp_path / "latest.json"
    assert read_pointer(latest) is None
    for text, reason in [
        ("", "Input data was truncated"),
        ('{"format"', "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ("[" * 200_000, ""),
        ("\x00", ""),
    ]:
        latest.write_text(text)
        with pytest.raises(SnapshotError, match=rf"latest\.json is damaged: .*{reason}"):
            read_pointer(latest)


def test_a_pointer_file_of_a_newer_version_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "snapshots")
    latest = tmp_path / "latest.json"
    write_pointer(latest, pointer_for(path, manifest()))
    make_newer(latest)
    with pytest.raises(NewerFormat, match=r"latest\.json has format 5.*install the version that"):
        read_pointer(latest)


@pytest.mark.fault(2, injected="the same: publishing")
def test_a_crash_at_any_step_of_publishing_leaves_the_old_pointer_or_the_new_one(
    tmp_path: Path,
) -> None:
    first, second = (
        pointer_for(path, snapshot.verify(path))
        for path in (write_snapshot(tmp_path / "s", sequence=sequence) for sequence in (1, 2))
    )
    latest = tmp_path / "latest.json"
    write_pointer(latest, first)

    def inspect() -> None:
        assert read_pointer(latest) in (first, second)

    assert crash_at_each_step(lambda: write_pointer(latest, second), inspect) == 4
    assert read_pointer(latest) == second
