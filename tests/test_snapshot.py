"""Snapshots come back bit for bit, damaged ones are refused, and a crash leaves none half done."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.manifests import (
    edit_manifest,
    make_newer,
    manifest,
    replace_file,
    write_snapshot,
)
from support.processes import in_child
from support.snapshots import TENSORS, crash_at_each_step, equal_tensors, flip_bit

from stream_ctr import state_files
from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.manifest import FORMAT
from stream_ctr.snapshots.pointer import pointer_for, write_pointer


def write(root: Path, sequence: int = 1, tensors: Any = TENSORS, **changes: Any) -> Path:
    return write_snapshot(root, tensors, sequence=sequence, **changes)


def segment(path: Path, data: bytes) -> tuple[Path, str, int]:
    path.write_bytes(data)
    return path, sha256(data).hexdigest(), len(data)


# -- writing and loading -------------------------------------------------------------------------


def test_a_snapshot_comes_back_bit_for_bit(tmp_path: Path) -> None:
    written = manifest(sequence=1)
    found, tensors = snapshot.load(write(tmp_path))
    assert equal_tensors(tensors, TENSORS)
    assert set(found.files) == {"model.safetensors", "joiner.safetensors"}
    assert found == manifest(sequence=1, files=found.files)
    assert found != written


def test_the_manifest_has_the_size_and_sha256_of_each_file_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path)
    for name, entry in json.loads((path / "manifest.json").read_text())["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": sha256(data).hexdigest()}


def test_the_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    """safetensors itself makes files that only their owner may read."""
    path = write(tmp_path)
    for file in path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~state_files.UMASK, file.name


def test_any_other_safetensors_reader_can_open_the_files(tmp_path: Path) -> None:
    with safe_open(write(tmp_path) / "model.safetensors", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("table"), TENSORS["model"]["table"])


@pytest.mark.parametrize("dtype", sorted(snapshot.DTYPES))
def test_every_supported_dtype_comes_back(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "a": {"x": np.array([[0, 1], [1, 0]]).astype(dtype), "empty": np.empty((0, 3), dtype)}
    }
    assert equal_tensors(snapshot.load(write(tmp_path, tensors=tensors))[1], tensors)


@pytest.mark.parametrize(
    "array",
    [np.zeros(2, np.complex128), np.array(["a"]), np.array([None]), np.zeros(1, "M8[ms]")],
    ids=lambda a: str(a.dtype),
)
def test_an_unsupported_dtype_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, array: Any
) -> None:
    with pytest.raises(
        SnapshotError, match=r"'x' of model.safetensors is .*cannot be stored; use bool, .*uint64"
    ):
        write(tmp_path, tensors={"model": {"x": array}})
    assert list(tmp_path.iterdir()) == []


def test_transposed_strided_and_big_endian_arrays_keep_their_values(tmp_path: Path) -> None:
    table = np.arange(12, dtype=np.int64).reshape(3, 4)
    tensors = {
        "a": {"transposed": table.T, "strided": table[:, ::2], "swapped": table.astype(">i8")}
    }
    loaded = snapshot.load(write(tmp_path, tensors=tensors))[1]["a"]
    for name, array in tensors["a"].items():
        np.testing.assert_array_equal(loaded[name], array)


def test_loaded_arrays_may_be_changed_and_do_not_follow_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    loaded = snapshot.load(path)[1]["model"]["table"]
    with open(path / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * 200)
    np.testing.assert_array_equal(loaded, TENSORS["model"]["table"])
    loaded += 1


def test_only_the_named_files_are_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    flip_bit(
        path / "joiner.safetensors", -1
    )  # the size is the same: only reading its bytes shows it
    assert set(snapshot.load(path, stems=["model"])[1]) == {"model"}
    chosen = snapshot.load(
        path, stems=lambda manifest: [manifest.published.replace("deepfm", "model")]
    )
    assert set(chosen[1]) == {"model"}
    assert snapshot.read_manifest(path) == chosen[0]
    with pytest.raises(SnapshotError, match=r"joiner\.safetensors has SHA-256"):
        snapshot.load(path)
    with pytest.raises(
        SnapshotError,
        match=r"has no file optimizer\.safetensors; it has model\.safetensors, joiner",
    ):
        snapshot.load(path, stems=["optimizer"])


def test_staged_segments_outlive_their_originals_and_move_into_the_snapshot(
    tmp_path: Path,
) -> None:
    original = segment(tmp_path / "7.arrow", b"rows")
    root = tmp_path / "snapshots"
    staged = snapshot.stage(root, {"7.arrow": original})
    original[0].unlink()
    path = snapshot.write(root, tensors=TENSORS, manifest=manifest(), segments=staged)
    assert (path / "7.arrow").read_bytes() == b"rows"
    assert list(root.iterdir()) == [path]
    found = snapshot.verify(path)
    assert snapshot.segments(path, found) == {"7.arrow": (path / "7.arrow", original[1])}
    assert set(snapshot.load(path)[1]) == set(TENSORS)


# -- damage --------------------------------------------------------------------------------------


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(
    name=st.sampled_from(["model.safetensors", "joiner.safetensors", "manifest.json"]),
    where=st.floats(0, 1, exclude_max=True),
)
def test_the_digest_of_a_pointer_covers_every_bit(tmp_path: Path, name: str, where: float) -> None:
    root = tmp_path / "flips"
    path = root / manifest(sequence=1).snapshot if root.exists() else write(root)
    good = (path / name).read_bytes()
    pinned = sha256((path / "manifest.json").read_bytes()).hexdigest()
    flip_bit(path / name, int(where * len(good)))
    with pytest.raises(SnapshotError, match=name):
        snapshot.verify(path, manifest_sha256=pinned)
    with pytest.raises(SnapshotError, match=name):
        snapshot.load(path, manifest_sha256=pinned)
    (path / name).write_bytes(good)
    assert snapshot.verify(path, manifest_sha256=pinned).epoch == 3


def swap_files(path: Path) -> None:
    (path / "model.safetensors").rename(path / "x")
    (path / "joiner.safetensors").rename(path / "model.safetensors")
    (path / "x").rename(path / "joiner.safetensors")


def replace_by_link(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent / "elsewhere")
    (path / "model.safetensors").symlink_to(path.parent / "elsewhere")


def add_entry(name: str) -> Callable[[Path], None]:
    entry = {"bytes": 1, "sha256": "0" * 64}
    return lambda path: edit_manifest(path, lambda m: m["files"].update({name: entry}))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: (path / "manifest.json").unlink(), r"manifest\.json: No such file"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 1'),
            r"manifest\.json is damaged: Input data was truncated",
        ),
        (
            lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
            r"manifest\.json is damaged",
        ),
        (
            lambda path: (path / "manifest.json").write_text("[" * 200_000),
            r"manifest\.json is damaged",
        ),
        (
            lambda path: (path / "manifest.json").write_text("[]"),
            r"manifest\.json is damaged: Expected `object`, got `array`",
        ),
        (
            lambda path: edit_manifest(path, lambda m: m.update(format=FORMAT + 1)),
            rf"manifest\.json has format {FORMAT + 1}, and this version of stream-ctr reads "
            rf"formats up to {FORMAT}",
        ),
        (
            lambda path: edit_manifest(path, lambda m: m.pop("format")),
            r"manifest\.json is damaged: Object missing required field `format`",
        ),
        (
            lambda path: edit_manifest(path, lambda m: m.pop("files")),
            r"manifest\.json is damaged: Object missing required field `files`",
        ),
        (add_entry("../../etc/x.safetensors"), r"'\.\./\.\./etc/x\.safetensors' is not a plain"),
        (add_entry("/x.safetensors"), r"'/x\.safetensors' is not a plain name"),
        (add_entry("model.pt"), r"'model\.pt' is not named \*\.safetensors, \*\.arrow or"),
        (
            lambda path: edit_manifest(
                path, lambda m: m["files"]["model.safetensors"].pop("sha256")
            ),
            r"manifest\.json is damaged: .*missing required field `sha256`.*files",
        ),
        (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (
            lambda path: (path / "extra.safetensors").write_bytes(b""),
            r"extra\.safetensors is not in the manifest",
        ),
        (
            lambda path: os.truncate(path / "model.safetensors", 100),
            r"model\.safetensors has 100 bytes, the manifest says",
        ),
        (swap_files, r"has \d+ bytes, the manifest says"),
        (replace_by_link, r"model\.safetensors is not a regular file"),
    ],
)
def test_damage_is_reported_with_the_name_of_the_file(
    tmp_path: Path, harm: Callable[[Path], object], reason: str
) -> None:
    path = write(tmp_path)
    harm(path)
    with pytest.raises(SnapshotError, match=reason):
        snapshot.verify(path)
    with pytest.raises(SnapshotError, match=reason):
        snapshot.load(path)


def test_a_manifest_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "manifest.json").rename(tmp_path / "elsewhere")
    (path / "manifest.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match=r"cannot read .*manifest\.json"):
        snapshot.load(path)


def test_a_pickle_named_safetensors_is_refused_even_with_a_true_digest(tmp_path: Path) -> None:
    path = write(tmp_path)
    replace_file(path, "model.safetensors", b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(SnapshotError, match=r"model\.safetensors is not a safetensors file"):
        snapshot.load(path)


def test_a_dtype_that_numpy_lacks_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    replace_file(path, "model.safetensors", struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(SnapshotError, match=r"model\.safetensors holds dtype 'BF16'"):
        snapshot.load(path)


def test_a_manifest_with_another_digest_than_its_pointer_says_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(
        SnapshotError, match=r"manifest\.json has SHA-256 .*, its pointer says 0000"
    ):
        snapshot.load(path, manifest_sha256="0" * 64)


# -- what cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../model", "a/b", "", ".hidden", "tmp-1", "nul\0"])
def test_a_snapshot_name_that_is_a_path_or_looks_unfinished_is_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(SnapshotError, match="snapshot"):
        write_snapshot(tmp_path / "root", TENSORS, snapshot=name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_stem_with_a_path_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="file stem '../model' is not a plain name"):
        write(tmp_path, tensors={"../model": {}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"counters": {"auc": float("nan")}}, "not JSON"),
        ({"counters": {"auc": object()}}, "not JSON"),
        (
            {"weights_sha256": ""},
            "the manifest of snapshot 00000001-.* is damaged: .*weights_sha256",
        ),
        ({"examples": -1}, "the manifest of snapshot 00000001-.* is damaged: .*examples"),
        ({"epoch": None}, "the manifest of snapshot 00000001-.* is damaged: .*epoch"),
    ],
)
def test_a_manifest_that_could_not_be_read_again_is_not_written(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SnapshotError, match=reason):
        write(tmp_path / "snapshots", **change)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_never_written_twice(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(SnapshotError, match="exists already"):
        write(tmp_path, tensors={"model": {}})
    assert equal_tensors(snapshot.load(path)[1], TENSORS)


def test_an_unfinished_snapshot_of_the_same_name_is_no_obstacle(tmp_path: Path) -> None:
    unfinished = tmp_path / f"tmp-{manifest(sequence=1).snapshot}"
    unfinished.mkdir()
    (unfinished / "old.safetensors").write_bytes(b"half")
    assert equal_tensors(snapshot.load(write(tmp_path))[1], TENSORS)


def test_too_little_space_is_an_error_with_the_path_before_anything_is_written(
    tmp_path: Path,
) -> None:
    huge = np.broadcast_to(np.zeros(1, np.float32), 2**48)
    with pytest.raises(
        SnapshotError, match=rf"needs 1,073,741,824\.0 MiB, {tmp_path} has [\d,.]+ MiB free"
    ):
        write(tmp_path, tensors={"model": {"x": huge}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(19, injected="a file size limit reached while a snapshot is written")
def test_a_disk_that_fills_while_writing_leaves_the_old_snapshot_alone(tmp_path: Path) -> None:
    old = write(tmp_path, 1)

    def fill() -> None:
        # Writes fail from here on, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
        with pytest.raises(
            SnapshotError,
            match=r"cannot write snapshot .*00000002.* MiB free there now, nothing was left behind",
        ):
            write(tmp_path, 2, tensors={"model": {"x": np.zeros(1 << 20)}})

    assert in_child(fill) == 0
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert snapshot.newest(tmp_path) == old
    assert snapshot.newest(tmp_path) != write(tmp_path, 2)


# -- crashes -------------------------------------------------------------------------------------


@pytest.mark.fault(2, injected="death before every system call that touches the disk: writing")
def test_a_crash_at_any_step_of_writing_leaves_the_old_snapshot_or_a_complete_new_one(
    tmp_path: Path,
) -> None:
    old = write(tmp_path, 1)
    new = tmp_path / manifest(sequence=2).snapshot
    newer = {"model": {"table": np.ones((3, 4), np.float32)}, "joiner": TENSORS["joiner"]}
    seen = set()

    def inspect() -> None:
        for name in snapshot.snapshot_ids(tmp_path):
            expected = TENSORS if name == old.name else newer
            assert equal_tensors(snapshot.load(tmp_path / name)[1], expected)
        seen.add(found := snapshot.newest(tmp_path))
        snapshot.clean(tmp_path)
        assert not list(tmp_path.glob("tmp-*"))
        if found == new:
            os.rename(new, tmp_path / "tmp-done")
            snapshot.clean(tmp_path)

    assert crash_at_each_step(lambda: write(tmp_path, 2, newer), inspect) >= 8
    assert seen == {old, new}


@pytest.mark.fault(2, injected="the same: retention")
def test_a_crash_at_any_step_of_retention_never_shows_half_a_snapshot(tmp_path: Path) -> None:
    def refill() -> None:
        snapshot.clean(tmp_path)
        for sequence in {1, 2, 3} - {int(name[:8]) for name in snapshot.snapshot_ids(tmp_path)}:
            write(tmp_path, sequence)

    def inspect() -> None:
        for name in snapshot.snapshot_ids(tmp_path):
            snapshot.verify(tmp_path / name)
        refill()

    refill()
    assert crash_at_each_step(lambda: snapshot.retain(tmp_path, 1), inspect) > 8
    assert [name[:8] for name in snapshot.snapshot_ids(tmp_path)] == ["00000003"]


def name_of(fd: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync = os.fsync
    rename = os.rename

    def recorded_fsync(fd: int) -> None:
        order.append(name_of(fd))
        fsync(fd)

    def recorded_rename(source: Path, target: Path) -> None:
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    name = write(tmp_path).name
    assert order == [
        "model.safetensors",
        "joiner.safetensors",
        "manifest.json",
        f"tmp-{snapshot.OWN}-{name}",
        "rename",
        tmp_path.name,
    ]


def test_retention_removes_a_name_from_the_disk_before_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rmtree = shutil.rmtree
    for sequence in (1, 2):
        write(tmp_path, sequence)

    def recorded_rmtree(path: Path) -> None:
        order.append(f"remove {path.name}")
        rmtree(path)

    monkeypatch.setattr(os, "fsync", lambda fd: order.append(f"fsync {name_of(fd)}"))
    monkeypatch.setattr(shutil, "rmtree", recorded_rmtree)
    [old] = snapshot.retain(tmp_path, 1)
    assert order == [f"fsync {tmp_path.name}", f"remove tmp-{old}"]


# -- choosing ------------------------------------------------------------------------------------


def remove_key(path: Path) -> None:
    edit_manifest(path, lambda m: m["schema"].pop("hash_seed"))


def add_key(path: Path) -> None:
    edit_manifest(path, lambda m: m["learner"].update(new=1))


def change_type(path: Path) -> None:
    edit_manifest(path, lambda m: m.update(examples="1000"))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: flip_bit(path / "model.safetensors", -1), "model.safetensors has SHA-256"),
        (remove_key, "missing required field `hash_seed`"),
        (add_key, "unknown field `new`"),
        (change_type, "Expected `int`, got `str`"),
        (lambda path: (path / "manifest.json").write_text("[" * 200_000), "is damaged"),
    ],
)
def test_a_damaged_snapshot_is_passed_over_with_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[Path], None],
    reason: str,
) -> None:
    good = write(tmp_path, 1)
    bad = write(tmp_path, 2)
    assert snapshot.newest(tmp_path) == bad
    harm(bad)
    with caplog.at_level(logging.WARNING):
        assert snapshot.newest(tmp_path) == good
    assert "00000002-20250101T101500Z is not used" in caplog.text
    assert reason in caplog.text


def test_a_snapshot_of_a_newer_version_is_never_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1)
    make_newer(write(tmp_path, 2) / "manifest.json")
    flip_bit(write(tmp_path, 3) / "model.safetensors", -1)
    with pytest.raises(NewerFormat, match=rf"00000002-.* has format {FORMAT + 1}.* install the"):
        snapshot.newest(tmp_path)


def test_a_newer_format_behind_a_good_snapshot_does_not_matter(tmp_path: Path) -> None:
    make_newer(write(tmp_path, 1) / "manifest.json")
    good = write(tmp_path, 2)
    assert snapshot.newest(tmp_path) == good


def test_a_published_snapshot_with_another_manifest_than_was_published_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "snapshots"
    first, second = write(root, 1), write(root, 2)
    write_pointer(tmp_path / "latest.json", pointer_for(second, snapshot.verify(second)))
    assert snapshot.newest(root) == second
    edit_manifest(second, lambda manifest: manifest.update(examples=7))
    assert snapshot.verify(second).examples == 7
    assert snapshot.newest(root) == first
    assert "its pointer says" in caplog.text
    (tmp_path / "latest.json").write_text("{}")
    assert snapshot.newest(root) == second


def test_it_is_an_error_if_no_snapshot_verifies_and_none_if_there_are_no_snapshots(
    tmp_path: Path,
) -> None:
    assert snapshot.newest(tmp_path / "nowhere") is None
    (tmp_path / "tmp-00000009").mkdir()
    assert snapshot.newest(tmp_path) is None
    for sequence in (1, 2):
        flip_bit(write(tmp_path, sequence) / "model.safetensors", 20)
    with pytest.raises(
        SnapshotError,
        match=r"none of the 2 snapshots in .* verifies; the newest: .*00000002.*model\.safetensors",
    ):
        snapshot.newest(tmp_path)


def test_the_newest_snapshot_with_a_model_is_found_along_the_parents(tmp_path: Path) -> None:
    with_fm = {**TENSORS, "fm.model": TENSORS["model"]}
    # The third snapshot descends from the first one: the run was resumed there.
    first = write(tmp_path, 1, with_fm)
    write(tmp_path, 2, with_fm, parent=first.name)
    third = write(tmp_path, 3, parent=first.name)
    fourth = write(tmp_path, 4, parent=third.name)
    assert snapshot.newest_with_model(tmp_path, fourth.name, "fm") == first
    assert snapshot.newest_with_model(tmp_path, first.name, "fm") == first
    assert snapshot.newest_with_model(tmp_path, fourth.name, "opnn") is None
    assert snapshot.newest_with_model(tmp_path, "00000099-removed", "fm") is None
    assert snapshot.newest_with_model(tmp_path, None, "fm") is None


def test_retention_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    names = [write(tmp_path, sequence).name for sequence in range(1, 6)]
    assert snapshot.retain(tmp_path, 2, protect=[names[0]]) == names[1:3]
    assert snapshot.snapshot_ids(tmp_path) == [names[0], *names[3:]]
    assert not list(tmp_path.glob("tmp-*"))
    assert snapshot.retain(tmp_path, 3) == []
    with pytest.raises(SnapshotError, match="at least one"):
        snapshot.retain(tmp_path, 0)


def test_the_next_sequence_is_above_that_of_damaged_snapshots_too(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (write(tmp_path, 12) / "manifest.json").unlink()
    (tmp_path / "by-hand").mkdir()
    assert snapshot.next_sequence(tmp_path) == 13


@given(
    st.lists(
        st.tuples(st.integers(0, 10**8 - 1), st.integers(-(10**12), 10**13)),
        min_size=2,
        max_size=2,
        unique_by=lambda pair: pair[0],
    )
)
def test_names_sort_by_sequence_for_any_event_time(pairs: list[tuple[int, int]]) -> None:
    names = [snapshot.new_id(*pair) for pair in sorted(pairs)]
    assert names == sorted(names)


# -- the digest of weights -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"w": np.zeros((2, 3), np.float32), "c": np.ones(1)},
        {"w": np.zeros((3, 2), np.int32), "b": np.ones(1)},
        {"w": np.zeros((3, 2), np.float32), "b": np.ones(1, np.float32)},
        {"w": np.zeros((3, 2), np.float32), "b": np.nextafter(np.ones(1), 2)},
        {"w": -np.zeros((3, 2), np.float32), "b": np.ones(1)},
        {"w": np.zeros((3, 2), np.float32)},
    ],
)
def test_the_digest_of_weights_covers_names_shapes_dtypes_and_single_bits(
    other: dict[str, Any],
) -> None:
    weights: dict[str, Any] = {"w": np.zeros((3, 2), np.float32), "b": np.ones(1)}
    assert snapshot.weights_sha256(other) != snapshot.weights_sha256(weights)


def test_the_digest_of_weights_is_of_the_values_and_not_of_their_layout() -> None:
    w: Any = np.arange(6, dtype=np.float32).reshape(2, 3)
    slices = [sha256(struct.pack("<3f", *row)).digest() for row in ((0, 1, 2), (3, 4, 5))]
    expected = sha256(b'["w", "<f4", [2, 3]]\n' + b"".join(slices)).hexdigest()
    for same_w in (w, np.asfortranarray(w), w.astype(">f4"), np.repeat(w, 2, axis=1)[:, ::2]):
        assert snapshot.weights_sha256({"w": same_w}) == expected
