"""Segments: rows are read back as written, damaged files are refused, unused files are deleted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from stream_ctr.errors import DataError
from stream_ctr.join.spill import Spill, folder_of_rank, remove_folders, segment_of


def columns(n: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "ids": rng.integers(-5, 1 << 30, (n, 3)).astype(np.int32),
        "values": rng.random((n, 2)).astype(np.float32),
        "truth": np.where(rng.random(n) < 0.5, np.nan, rng.random(n)),
        "none": np.empty((n, 0), np.float32),
    }


def digests(spill: Spill) -> dict[str, tuple[Path, str]]:
    """Return the (path, SHA-256) of each file, by name."""
    return {name: (path, sha256) for name, (path, sha256, _) in spill.files().items()}


def test_rows_come_back_in_the_order_asked_for_from_any_segments(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    first = columns(100)
    second = columns(50, seed=1)
    places = np.concatenate([spill.write(first, last=1), spill.write(second, last=2)])
    asked = np.random.default_rng(2).permutation(150)[:70]
    found = spill.read(places[asked])
    assert found.keys() == {"ids", "values", "truth"}  # a column without width has nothing to keep
    for name, column in found.items():
        expected = np.concatenate([first[name], second[name]])[asked]
        assert column.dtype == expected.dtype
        assert np.array_equal(column, expected, equal_nan=name == "truth")


def test_a_segment_is_an_arrow_file_that_other_programs_can_read(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    written = columns(4)
    spill.write(written, last=0)
    [path] = tmp_path.glob("*/*")
    table = pa.ipc.open_file(path).read_all()
    assert table["ids"].to_pylist() == written["ids"].tolist()


def test_segments_are_dropped_when_their_last_row_is_past(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    places = [spill.write(columns(2), last=last) for last in (30, 10, 20)]
    spill.drop(spill.ended_before(20))
    assert list(spill.files()) == sorted(path.name for path in tmp_path.glob("*/*"))
    assert [int(segment_of(place)[0]) in spill.segments for place in places] == [True, False, True]


def test_folders_of_an_earlier_spill_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    Spill(tmp_path).write(columns(2), last=0)
    (tmp_path / "notes.txt").write_text("mine")
    Spill(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_spill_that_was_taken_over_cannot_harm_its_successor(tmp_path: Path) -> None:
    old = Spill(tmp_path)
    lost = old.write(columns(2), last=0)
    successor = Spill(tmp_path)
    places = successor.write(columns(2, seed=1), last=0)
    with pytest.raises(DataError):
        old.read(lost)
    with pytest.raises(OSError, match="No such file"):
        old.write(columns(2), last=0)
    old.drop([0])
    assert np.array_equal(successor.read(places)["ids"], columns(2, seed=1)["ids"])


def test_spills_of_several_processes_number_their_segments_differently(tmp_path: Path) -> None:
    spills = [Spill(folder_of_rank(tmp_path, rank), numbers=(rank, 3)) for rank in range(3)]
    for spill in spills:
        for last in range(2):
            spill.write(columns(2), last=last)
    assert [list(spill.segments) for spill in spills] == [[0, 3], [1, 4], [2, 5]]
    # Two processes go on with some of the six segments, and none gives a number again.
    for rank, kept in enumerate(([0, 1], [5])):
        state = {
            "number": np.array(kept),
            "rows": np.full(len(kept), 2),
            "last": np.zeros(len(kept), np.int64),
            "before": np.array([5]),
        }
        files = {name: found for spill in spills for name, found in digests(spill).items()}
        resumed = Spill(tmp_path / f"resumed-{rank}", numbers=(rank, 2))
        resumed.load_state_dict(state, files)
        resumed.write(columns(1), last=0)
        assert list(resumed.segments) == [*kept, 6 + rank]
    fresh = Spill(tmp_path / "fresh", numbers=(1, 2))
    fresh.load_state_dict({"before": np.array([5])}, {})  # it has none of them
    fresh.write(columns(1), last=0)
    assert list(fresh.segments) == [7]
    remove_folders(tmp_path)
    assert not list(tmp_path.glob("run-*"))


def test_without_a_directory_a_temporary_one_is_used_and_removed_in_the_end() -> None:
    spill = Spill()
    spill.write(columns(2), last=0)
    [(path, _, size)] = spill.files().values()
    assert path.stat().st_size == size
    del spill
    assert not path.parent.exists()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_refused_by_name_on_load_and_on_reading(
    tmp_path: Path, damage: str
) -> None:
    spill = Spill(tmp_path / "a")
    places = spill.write(columns(1000), last=0)
    [path] = tmp_path.glob("a/*/*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(data if damage == "flipped" else data[:-1])
    with pytest.raises(DataError, match=rf"{path}.*the last snapshot has them"):
        spill.read(places[:1])
    files = {path.name: (path, spill.segments[0].sha256)}
    with pytest.raises(ValueError, match=str(path)):
        Spill(tmp_path / "b").load_state_dict(spill.state_dict(), files)
    missing = f"segment {path.name} is missing: 1000 impressions are in it"
    with pytest.raises(ValueError, match=missing):
        Spill(tmp_path / "c").load_state_dict(spill.state_dict(), {})


def test_a_link_to_a_segment_outlives_it_and_can_be_loaded(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "a")
    written = columns(10)
    places = spill.write(written, last=7)
    state = spill.state_dict()
    files = {}
    for name, (path, sha256) in digests(spill).items():
        os.link(path, tmp_path / name)
        files[name] = tmp_path / name, sha256
    spill.drop(list(spill.segments))
    other = Spill(tmp_path / "b")
    other.load_state_dict(state, files)
    assert np.array_equal(other.read(places)["ids"], written["ids"])
    added = other.write(columns(5, seed=1), last=9)
    assert not set(segment_of(added)) & set(segment_of(places))
    assert other.ended_before(8) == [0]


def test_a_segment_on_another_file_system_is_copied(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here")
    spill = Spill()
    other = Spill(tmp_path)
    places = spill.write(columns(3), last=0)
    [(name, (path, sha256))] = digests(spill).items()
    copy = elsewhere / f"{os.getpid()}-{name}"
    try:
        copy.write_bytes(path.read_bytes())
        other.load_state_dict(spill.state_dict(), {name: (copy, sha256)})
    finally:
        copy.unlink(missing_ok=True)
    assert np.array_equal(other.read(places)["ids"], columns(3)["ids"])
