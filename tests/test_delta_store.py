"""Deltas on the disk: all of one or none is listed, whatever ends the process or the disk."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.deltas import BASE, SMALL_PAYLOAD, Made, chain, large, made
from support.manifests import RUN, make_newer
from support.power_loss import LOSSES, Disk
from support.processes import in_child
from support.snapshots import crash_at_each_step

from stream_ctr import failpoint
from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import delta_store, files
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.delta import Delta, DeltaPosition, DeltaRank
from stream_ctr.snapshots.delta_sources import FileDeltas
from stream_ctr.snapshots.delta_store import (
    FOLDER,
    DeltaEntry,
    DeltaIndex,
    DeltaStore,
    decode_index,
    encode_index,
    to_keep,
)

PLENTY = 1 << 40


def write(store: DeltaStore, *links: Made) -> None:
    for link in links:
        store.write(link.header_bytes, link.header, link.payload)


def listed(directory: Path) -> list[Delta]:
    """Return the deltas that a new reader finds. Raises the first error that it finds."""
    found = []
    for each in FileDeltas(directory).poll(0.0):
        if isinstance(each, SnapshotError):
            raise each
        found.append(each)
    return found


def deltas(links: list[Made]) -> list[Delta]:
    return [link.delta for link in links]


def names(directory: Path) -> set[str]:
    return {path.name for path in (directory / FOLDER).iterdir()}


def files_of(links: list[Made]) -> set[str]:
    """Return the names of all files in the folder when these deltas are kept."""
    ranks = [link.header.rank.name for link in links]
    return {"index.json", *(f"{name}.{kind}" for name in ranks for kind in ("json", "safetensors"))}


def test_deltas_are_listed_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    links = chain(3)
    store = DeltaStore(tmp_path)
    assert store.index is None
    write(store, *links)
    assert listed(tmp_path) == deltas(links)
    assert names(tmp_path) == files_of(links)
    index = decode_index((tmp_path / FOLDER / "index.json").read_bytes())
    assert index == store.index
    assert index.run == RUN
    assert index.deltas[1] == DeltaEntry(
        DeltaRank(3, 2),
        links[1].sha256,
        len(links[1].header_bytes) + len(links[1].payload),
        BASE,
    )


def test_the_next_process_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    first, second = chain(2)
    write(DeltaStore(tmp_path), first)
    resumed = DeltaStore(tmp_path)
    write(resumed, second, *chain(1, epoch=4))
    assert [delta.header.rank for delta in listed(tmp_path)] == [
        DeltaRank(3, 1),
        DeltaRank(3, 2),
        DeltaRank(4, 1),
    ]


def test_a_delta_is_never_written_twice_and_none_below_another(tmp_path: Path) -> None:
    first, second = chain(2)
    store = DeltaStore(tmp_path)
    write(store, second)
    for link in (first, second):
        with pytest.raises(SnapshotError, match=f"00000003-00000002 is in {tmp_path}"):
            write(store, link)
    assert listed(tmp_path) == [second.delta]


def test_the_deltas_of_another_run_are_removed(tmp_path: Path) -> None:
    write(DeltaStore(tmp_path), *chain(3))
    others = chain(1, run="f" * 32, epoch=1)
    store = DeltaStore(tmp_path)
    write(store, *others)
    assert listed(tmp_path) == deltas(others)
    assert names(tmp_path) == files_of(others)


def test_a_check_that_raises_leaves_nothing(tmp_path: Path) -> None:
    """A process that was taken over must not list what it has written."""
    first, second = chain(2)
    store = DeltaStore(tmp_path)
    write(store, first)

    def taken_over() -> None:
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        store.write(second.header_bytes, second.header, second.payload, check=taken_over)
    assert listed(tmp_path) == [first.delta]
    assert names(tmp_path) == files_of([first])
    write(store, second)


@pytest.mark.parametrize("at", range(12))
def test_a_disk_that_is_full_leaves_the_deltas_before_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Whichever of the writes, syncs and renames is the first that fails."""
    first, second = chain(2)
    store = DeltaStore(tmp_path)
    write(store, first)
    calls = itertools.count()

    def failing(call: Any) -> Any:
        def fail(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **keywords)

        return fail

    with monkeypatch.context() as patch:
        for name in ("write_durably", "sync_directory"):
            patch.setattr(files, name, failing(getattr(files, name)))
        patch.setattr(os, "replace", failing(os.replace))
        if at >= 9:
            write(store, second)
            return
        with pytest.raises(SnapshotError, match="No space left on device"):
            write(store, second)
    if at < 8:  # the ninth is the sync after the index was replaced
        assert listed(tmp_path) == [first.delta]
        assert names(tmp_path) == files_of([first])
    write(store, second)
    assert listed(tmp_path) == [first.delta, second.delta]


@pytest.mark.fault(19, injected="a file size limit reached while a delta is written")
def test_a_disk_that_fills_while_writing_leaves_nothing_of_the_delta(tmp_path: Path) -> None:
    first, second = chain(2, payloads=[SMALL_PAYLOAD, large(2)])
    write(DeltaStore(tmp_path), first)

    def fill() -> None:
        # Writes fail from here on, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
        with pytest.raises(SnapshotError, match=r"cannot write .*00000002\.safetensors: File too"):
            write(DeltaStore(tmp_path), second)

    assert in_child(fill) == 0
    assert names(tmp_path) == files_of([first])
    write(DeltaStore(tmp_path), second)


def test_a_symbolic_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match="symbolic link"):
        write(DeltaStore(tmp_path), made())
    assert not any((tmp_path / "elsewhere").iterdir())


# -- what is on the disk at the start --------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 10])
def test_a_damaged_index_counts_as_none_and_is_said(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write(DeltaStore(tmp_path), *chain(2))
    (tmp_path / FOLDER / "index.json").write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        store = DeltaStore(tmp_path)
    assert "the deltas so far are not used" in caplog.text
    assert len(store.clean()) == 4
    write(store, *chain(1, epoch=4))
    assert names(tmp_path) == files_of(chain(1, epoch=4))


def test_an_index_of_a_newer_version_is_not_replaced(tmp_path: Path) -> None:
    write(DeltaStore(tmp_path), *chain(1))
    make_newer(tmp_path / FOLDER / "index.json")
    with pytest.raises(NewerFormat):
        DeltaStore(tmp_path)


def test_every_flipped_bit_of_an_index_is_found(tmp_path: Path) -> None:
    write(DeltaStore(tmp_path), made())
    path = tmp_path / FOLDER / "index.json"
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SnapshotError):
            decode_index(bytes(damaged))


def test_an_index_out_of_order_is_refused() -> None:
    entries = tuple(DeltaEntry(DeltaRank(3, number), "0" * 64, 1, BASE) for number in (2, 1))
    with pytest.raises(SnapshotError, match="not in the order of their ranks"):
        encode_index(DeltaIndex(run=RUN, deltas=entries))


def test_cleaning_removes_what_no_index_lists_and_nothing_else(tmp_path: Path) -> None:
    links = chain(3)
    store = DeltaStore(tmp_path)
    assert store.clean() == []
    write(store, *links[:2])
    folder = tmp_path / FOLDER
    (folder / "00000003-00000003.safetensors").write_bytes(b"x")
    (folder / "tmp-00000003-00000003.json").write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    assert sorted(store.clean()) == ["00000003-00000003.safetensors", "tmp-00000003-00000003.json"]
    assert names(tmp_path) == {*files_of(links[:2]), "notes.txt"}
    assert listed(tmp_path) == deltas(links[:2])


def test_as_many_deltas_are_listed_as_an_index_has_room_for() -> None:
    most = DeltaIndex(
        run=RUN,
        deltas=tuple(
            DeltaEntry(DeltaRank(1 << 40, number), "f" * 64, 1 << 40, BASE)
            for number in range(delta_store.MOST_DELTAS)
        ),
    )
    assert len(encode_index(most)) < delta_store.LARGEST_INDEX_BYTES


def test_beyond_that_number_the_oldest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_store, "MOST_DELTAS", 2)
    links = chain(3)
    write(DeltaStore(tmp_path), *links)
    assert listed(tmp_path) == deltas(links[1:])
    assert names(tmp_path) == files_of(links[1:])


# -- retention -------------------------------------------------------------------------------------


def test_expired_deltas_go_with_their_files(tmp_path: Path) -> None:
    links = chain(5)
    store = DeltaStore(tmp_path)
    assert store.retain({}, most_bytes=PLENTY) == []
    write(store, *links)
    assert store.retain({BASE: None}, most_bytes=PLENTY) == []
    at_3 = {"B": links[2].position, "C": links[3].position}
    assert store.retain(at_3, most_bytes=PLENTY) == [
        *("00000003-00000001", "00000003-00000002", "00000003-00000003")
    ]
    assert names(tmp_path) == files_of(links[3:])
    assert listed(tmp_path) == deltas(links[3:])
    one = len(links[4].header_bytes) + len(links[4].payload)
    assert store.retain(at_3, most_bytes=one) == ["00000003-00000004"]
    write(store, *chain(1, first=6, parent=links[4].sha256))


entries = st.builds(
    lambda sizes, split: tuple(
        DeltaEntry(
            DeltaRank(3 if number < split else 4, number),
            f"{number:064x}",
            size,
            "A" if number < split else "B",
        )
        for number, size in enumerate(sizes)
    ),
    st.lists(st.integers(1, 10), min_size=1, max_size=12),
    st.integers(0, 12),
)


@given(entries, st.data())
def test_what_is_kept_is_the_newest_of_what_a_snapshot_needs(
    all_: tuple[DeltaEntry, ...], data: st.DataObject
) -> None:
    positions = st.none() | st.sampled_from(all_).map(
        lambda entry: DeltaPosition(entry.rank, entry.sha256)
    )
    snapshots = data.draw(st.dictionaries(st.sampled_from("ABCD"), positions))
    most_bytes = data.draw(st.integers(0, 100))
    kept = to_keep(all_, snapshots, most_bytes=most_bytes)
    assert kept == tuple(entry for entry in all_ if entry in kept), "in their order"
    assert kept[-1] == all_[-1], "the newest always stays"
    assert sum(entry.bytes for entry in kept) <= max(most_bytes, all_[-1].bytes)
    enough = to_keep(all_, snapshots, most_bytes=PLENTY)
    assert kept == enough[len(enough) - len(kept) :], "the oldest goes first"
    for name, position in snapshots.items():
        chain_ = [entry for entry in all_ if entry.base == name]
        assert {*chain_} <= {*enough}
        if position:
            (at,) = (entry for entry in all_ if entry.sha256 == position.sha256)
            after = {
                entry for entry in all_ if entry.base == at.base and entry.rank > position.rank
            }
            assert after <= {*enough}
    if snapshots and all(position is None for position in snapshots.values()):
        assert {entry.base for entry in enough[:-1]} <= {*snapshots}, "nothing is kept for nobody"


# -- crashes ---------------------------------------------------------------------------------------

POINTS = ("delta.payload", "delta.header", "delta.index", "delta.retain")


@pytest.mark.fault(2, injected="death at each failpoint of the store of deltas")
@pytest.mark.parametrize(
    ("at", "left"),
    [
        ("delta.payload:1", []),
        ("delta.header:1", []),
        ("delta.index:1", [1]),
        ("delta.payload:3", [1, 2]),
        ("delta.header:3", [1, 2]),
        ("delta.index:3", [1, 2, 3]),
        ("delta.retain:1", [3]),
    ],
)
def test_a_kill_leaves_what_was_listed_and_the_next_process_cleans_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, left: list[int]
) -> None:
    links = chain(3)

    def die() -> None:
        monkeypatch.setattr(failpoint, "_ARMED", failpoint.parse(at))
        monkeypatch.setattr(failpoint, "_REACHED", itertools.count(1))
        store = DeltaStore(tmp_path)
        write(store, *links)
        store.retain({"B": links[1].position}, most_bytes=PLENTY)

    assert in_child(die) == failpoint.EXIT_CODE
    kept = [link for link in links if link.header.rank.sequence in left]
    assert listed(tmp_path) == deltas(kept)
    store = DeltaStore(tmp_path)
    store.clean()
    assert names(tmp_path) == (files_of(kept) if kept else set())
    resumed = chain(1, epoch=4)
    write(store, *resumed)
    assert listed(tmp_path) == deltas([*kept, *resumed])


@pytest.mark.slow
@pytest.mark.fault(2, injected="death before every system call that touches the disk: deltas")
def test_a_death_at_any_step_leaves_the_deltas_before_or_those_and_the_new_one(
    tmp_path: Path,
) -> None:
    links = chain(3)
    seen = set()

    def inspect() -> None:
        found = [delta.header.rank.sequence for delta in listed(tmp_path)]
        seen.add(tuple(found))
        shutil.rmtree(tmp_path / FOLDER)
        begin()

    def begin() -> None:
        write(DeltaStore(tmp_path), *links[:2])

    def work() -> None:
        store = DeltaStore(tmp_path)
        store.clean()
        write(store, links[2])
        store.retain({"B": links[1].position}, most_bytes=PLENTY)

    begin()
    assert crash_at_each_step(work, inspect) > 12
    assert seen == {(1, 2), (1, 2, 3), (3,)}


def test_every_failpoint_of_the_store_is_among_those() -> None:
    source = Path(delta_store.__file__).read_text()
    assert {*POINTS} == {*re.findall(r'failpoint\("([^"]+)"\)', source)}


@pytest.mark.slow
@pytest.mark.fault(
    35, injected="the same while deltas are written and removed, before every system call"
)
def test_a_power_loss_at_any_moment_leaves_an_index_whose_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = chain(4)
    rng = random.Random(0)
    counts = []
    written = 0

    def lose(disk: Disk) -> None:
        for loss in LOSSES:
            target = tmp_path / "left"
            disk.left(target, loss, rng)
            found = listed(target / "state") if (target / "state").is_dir() else []
            shutil.rmtree(target)
            ranks = [delta.header.rank.sequence for delta in found]
            assert ranks == list(range(ranks[0], ranks[-1] + 1)) if ranks else True
            assert (ranks[-1] if ranks else 0) >= written, "what was written is there"
            counts.append(len(found))

    (tmp_path / "disk").mkdir()
    with Disk(tmp_path / "disk", lose).watched(monkeypatch):
        store = DeltaStore(tmp_path / "disk" / "state")
        for link in links:
            write(store, link)
            written = link.header.rank.sequence
        store.retain({"B": links[1].position}, most_bytes=PLENTY)
    assert {0, 1, 2, 3, 4} <= {*counts}
