"""A delta is on disk before any outlet gets it, and an outlet gets all of them in order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from support.delta_chains import apply, links
from support.deltas import HEADER
from support.keys import write_keys

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.snapshots import delta_writer
from stream_ctr.snapshots.delta import (
    Changes,
    DeltaHeader,
    DeltaRank,
    decode_header,
    header_sha256,
)
from stream_ctr.snapshots.delta_store import DeltaStore
from stream_ctr.snapshots.delta_writer import DeltaWriter, TooLarge, WrittenDelta
from stream_ctr.snapshots.signing import PublicKey, SigningKey


def changes(value: float = 0.5) -> Changes:
    rows = np.array([1, 5], np.uint32)
    return {"ftrl.model": {"rows": rows, "values": np.full(2, value, np.float32)}}


def header(sequence: int = 1) -> DeltaHeader:
    rank = DeltaRank(3, sequence)
    return replace(HEADER, rank=rank, rows={"ftrl.model": 2}, payload_sha256="0" * 64)


class Outlet:
    """Takes deltas, and refuses as many as `refuses` says first."""

    def __init__(self, refuses: int = 0) -> None:
        self.taken: list[str] = []
        self.refuses = refuses

    def __call__(self, header_bytes: bytes, header: DeltaHeader, payload: bytes) -> None:
        assert decode_header(header_bytes) == header
        if self.refuses:
            self.refuses -= 1
            raise SnapshotError("the broker is away")
        self.taken.append(header.rank.name)


def writer(directory: Path, **options: Any) -> DeltaWriter:
    return DeltaWriter(DeltaStore(directory), now_ms=lambda: 77, **options)


def write(to: DeltaWriter, sequence: int) -> WrittenDelta:
    to.begin(changes(), header(sequence))
    written = to.take(wait=True)
    assert written
    return written


def test_a_delta_is_written_with_the_digest_of_its_payload(tmp_path: Path) -> None:
    to = writer(tmp_path)
    assert to.take(wait=True) is None
    position = to.begin(changes(), header())
    assert to.busy
    written = to.take(wait=True)
    assert written
    assert not to.busy
    (found,) = links(tmp_path)
    assert position() == written.position == found.position
    assert written.at_ms == 77
    assert found.header.payload_bytes == len(found.payload)
    assert found.header.payload_sha256 == header_sha256(found.payload)
    plain = {"ftrl.model": {"values": np.zeros(8, np.float32)}}
    apply(plain, found)
    assert plain["ftrl.model"]["values"].tolist() == [0, 0.5, 0, 0, 0, 0.5, 0, 0]
    to.close()


def test_a_header_is_signed(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "trainer")
    to = writer(tmp_path, sign=SigningKey(private).sign)
    write(to, 1)
    data = (tmp_path / "deltas" / "00000003-00000001.json").read_bytes()
    decode_header(data, signature=PublicKey(public).verify)
    to.close()


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    to = writer(tmp_path)
    position = to.begin(changes(np.inf), header())
    with pytest.raises(SnapshotError, match=r"delta 00000003-00000001 is not written: 'values' of"):
        to.take(wait=True)
    assert position() is None
    assert links(tmp_path) == []
    to.close()


def test_a_payload_that_no_server_reads_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_writer, "LARGEST_PAYLOAD_BYTES", 100)
    to = writer(tmp_path)
    to.begin(changes(), header())
    with pytest.raises(TooLarge, match=r"delta 00000003-00000001 is not written: it has 0\.0 MiB"):
        to.take(wait=True)
    assert links(tmp_path) == []
    to.close()


def test_a_run_that_was_taken_over_writes_no_delta(tmp_path: Path) -> None:
    def check() -> None:
        raise ConfigError("taken over")

    outlet = Outlet()
    to = writer(tmp_path, check=check, outlets=[outlet])
    position = to.begin(changes(), header())
    with pytest.raises(ConfigError, match="taken over"):
        to.take(wait=True)
    assert position() is None
    assert links(tmp_path) == []
    assert outlet.taken == []
    to.close()


def test_taking_without_waiting_returns_none_until_the_delta_is_on_disk(tmp_path: Path) -> None:
    on_disk = threading.Event()

    def check() -> None:
        assert on_disk.wait(60)

    to = writer(tmp_path, check=check)
    to.begin(changes(), header())
    assert to.take(wait=False) is None
    on_disk.set()
    assert to.take(wait=True)
    to.close()


def test_an_outlet_that_failed_gets_what_it_lacks_before_the_next_delta(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away, there = Outlet(refuses=2), Outlet()
    to = writer(tmp_path, outlets=[away, there])
    assert [write(to, sequence).unsent for sequence in (1, 2, 3)] == [1, 1, 0]
    names = [link.header.rank.name for link in links(tmp_path)]
    assert away.taken == there.taken == names
    assert caplog.text.count("the broker is away") == 1
    to.close()


def test_what_an_outlet_lacks_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Outlet(refuses=3)
    to = writer(tmp_path, outlets=[away])
    size = write(to, 1).header.payload_bytes
    monkeypatch.setattr(delta_writer, "LACKING_BYTES", 2 * size)
    for sequence in (2, 3, 4):
        write(to, sequence)
    assert away.taken == ["00000003-00000002", "00000003-00000003", "00000003-00000004"]
    to.close()
