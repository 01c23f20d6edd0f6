"""Snapshots: what is written comes back bit for bit, what was damaged is refused, and a crash never shows half of one."""

import json
import logging
import os
import resource
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
from support.processes import in_child

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import snapshot

TENSORS = {
    "model": {
        "table": np.arange(12, dtype=np.float32).reshape(3, 4),
        "bias": np.array(0.5, np.float32),
    },
    "joiner": {
        "id_hash": np.array([0, 1, 2**64 - 1], np.uint64),
        "time": np.array([-1, 2**62], np.int64),
        "label": np.array([], np.bool_),
    },
}
MANIFEST = {
    "model": "deepfm",
    "epoch": 3,
    "sequence": 1,
    "examples": 1000,
    "event_time_ms": 1_735_726_500_000,
    "created_ms": 1_735_726_501_000,
}


def write(root: Path, sequence: int = 1, tensors: Any = TENSORS, **manifest: object) -> Path:
    return snapshot.write(
        root,
        tensors=tensors,
        manifest={**MANIFEST, **manifest},
        snapshot_id=snapshot.new_id(sequence, 0),
    )


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        one[stem].keys() == other[stem].keys()
        and all(
            (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
            for a, b in (
                (np.asarray(one[stem][name]), np.asarray(other[stem][name])) for name in one[stem]
            )
        )
        for stem in one
    )


def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    manifest, tensors = snapshot.load(write(tmp_path))
    assert same(tensors, TENSORS)
    assert manifest["model"] == "deepfm"
    assert set(manifest["files"]) == {"model.safetensors", "joiner.safetensors"}


def test_the_manifest_names_size_and_sha256_of_each_file_as_it_is_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path)
    for name, entry in json.loads((path / "manifest.json").read_text())["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": sha256(data).hexdigest()}


def test_any_other_safetensors_reader_can_open_the_files(tmp_path: Path) -> None:
    with safe_open(write(tmp_path) / "model.safetensors", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("table"), TENSORS["model"]["table"])


@pytest.mark.parametrize("dtype", sorted(snapshot.DTYPES))
def test_every_dtype_it_promises_comes_back(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "a": {"x": np.array([[0, 1], [1, 0]]).astype(dtype), "empty": np.empty((0, 3), dtype)}
    }
    assert same(snapshot.load(write(tmp_path, tensors=tensors))[1], tensors)


@pytest.mark.parametrize(
    "array",
    [np.zeros(2, np.complex128), np.array(["a"]), np.array([None]), np.zeros(1, "M8[ms]")],
    ids=lambda a: str(a.dtype),
)
def test_a_dtype_that_cannot_be_stored_is_refused_by_name_before_anything_is_written(
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


def test_loaded_arrays_do_not_change_when_the_file_does_and_may_be_changed(tmp_path: Path) -> None:
    path = write(tmp_path)
    loaded = snapshot.load(path)[1]["model"]["table"]
    with open(path / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * 200)
    np.testing.assert_array_equal(loaded, TENSORS["model"]["table"])
    loaded += 1


def test_only_the_named_files_are_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    damage(path / "joiner.safetensors", -1)  # same size: only a reader of the bytes can notice
    assert set(snapshot.load(path, files=["model"])[1]) == {"model"}
    assert set(
        snapshot.load(path, files=lambda manifest: [manifest["model"].replace("deepfm", "model")])[
            1
        ]
    ) == {"model"}
    with pytest.raises(SnapshotError, match=r"joiner\.safetensors has SHA-256"):
        snapshot.load(path)
    with pytest.raises(
        SnapshotError,
        match=r"has no file optimiser\.safetensors; it has model\.safetensors, joiner",
    ):
        snapshot.load(path, files=["optimiser"])


def damage(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(
    name=st.sampled_from(["model.safetensors", "joiner.safetensors", "manifest.json"]),
    where=st.floats(0, 1, exclude_max=True),
)
def test_no_flipped_bit_gets_past_the_pointers_hash(
    tmp_path: Path, name: str, where: float
) -> None:
    root = tmp_path / "flips"
    path = root / snapshot.new_id(1, 0) if root.exists() else write(root)
    good = (path / name).read_bytes()
    pinned = sha256((path / "manifest.json").read_bytes()).hexdigest()
    damage(path / name, int(where * len(good)))
    with pytest.raises(SnapshotError, match=name):
        snapshot.verify(path, manifest_sha256=pinned)
    with pytest.raises(SnapshotError, match=name):
        snapshot.load(path, manifest_sha256=pinned)
    (path / name).write_bytes(good)
    assert snapshot.verify(path, manifest_sha256=pinned)["epoch"] == 3


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return apply


def swap(path: Path) -> None:
    (path / "model.safetensors").rename(path / "x")
    (path / "joiner.safetensors").rename(path / "model.safetensors")
    (path / "x").rename(path / "joiner.safetensors")


def replace_by_link(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent / "elsewhere")
    (path / "model.safetensors").symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: (path / "manifest.json").unlink(), r"manifest\.json: No such file"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 1'),
            r"manifest\.json is not JSON",
        ),
        (
            lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
            r"manifest\.json is not JSON",
        ),
        (
            lambda path: (path / "manifest.json").write_text("[" * 100_000),
            r"manifest\.json is not JSON",
        ),
        (
            lambda path: (path / "manifest.json").write_text("[]"),
            r"manifest\.json must be a JSON object, got list",
        ),
        (
            edit(lambda m: m.update(format=2)),
            r"manifest\.json has format 2, this version of stream-ctr reads 1",
        ),
        (edit(lambda m: m.pop("format")), r"manifest\.json has format None"),
        (edit(lambda m: m.pop("files")), r"'files' must be an object"),
        (
            edit(
                lambda m: m["files"].update({"../../etc/x.safetensors": {"bytes": 1, "sha256": ""}})
            ),
            r"'\.\./\.\./etc/x\.safetensors' is not a plain",
        ),
        (
            edit(lambda m: m["files"].update({"/x.safetensors": {"bytes": 1, "sha256": ""}})),
            r"'/x\.safetensors' is not a plain name",
        ),
        (
            edit(lambda m: m["files"].update({"model.pt": {"bytes": 1, "sha256": ""}})),
            r"'model\.pt' is not named \*\.safetensors",
        ),
        (
            edit(lambda m: m["files"]["model.safetensors"].pop("sha256")),
            r"'model\.safetensors' must have 'bytes' and 'sha256'",
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
        (swap, r"has \d+ bytes, the manifest says"),
        (replace_by_link, r"model\.safetensors is not a regular file"),
    ],
)
def test_what_is_wrong_with_a_snapshot_is_said_with_the_files_name(
    tmp_path: Path, harm: Callable[[Path], object], reason: str
) -> None:
    path = write(tmp_path)
    harm(path)
    with pytest.raises(SnapshotError, match=reason):
        snapshot.verify(path)
    with pytest.raises(SnapshotError, match=reason):
        snapshot.load(path)


def put_behind_a_true_hash(path: Path, data: bytes) -> None:
    (path / "model.safetensors").write_bytes(data)
    edit(
        lambda m: m["files"].update(
            {"model.safetensors": {"bytes": len(data), "sha256": sha256(data).hexdigest()}}
        )
    )(path)


def test_a_pickle_under_a_safetensors_name_is_refused_even_with_a_true_hash(tmp_path: Path) -> None:
    path = write(tmp_path)
    put_behind_a_true_hash(path, b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(SnapshotError, match=r"model\.safetensors is not a safetensors file"):
        snapshot.load(path)


def test_a_dtype_that_numpy_lacks_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    put_behind_a_true_hash(path, struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(SnapshotError, match=r"model\.safetensors holds dtype 'BF16'"):
        snapshot.load(path)


@pytest.mark.parametrize("name", ["../model", "a/b", "", ".hidden", "tmp-1", "nul\0"])
def test_a_snapshot_id_that_is_a_path_or_looks_unfinished_is_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(SnapshotError, match="snapshot"):
        snapshot.write(tmp_path / "root", tensors=TENSORS, manifest={}, snapshot_id=name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_stem_with_a_path_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="file stem '../model' is not a plain name"):
        write(tmp_path, tensors={"../model": {}})


def test_a_manifest_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="not JSON"):
        write(tmp_path, auc=float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_never_written_twice(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(SnapshotError, match="exists already"):
        write(tmp_path, tensors={"model": {}})
    assert same(snapshot.load(path)[1], TENSORS)


def test_what_a_crash_left_under_the_same_id_is_no_obstacle(tmp_path: Path) -> None:
    left = tmp_path / f"tmp-{snapshot.new_id(1, 0)}"
    left.mkdir()
    (left / "old.safetensors").write_bytes(b"half")
    assert same(snapshot.load(write(tmp_path))[1], TENSORS)


def test_too_little_room_is_said_with_the_path_and_the_free_space_before_anything_is_written(
    tmp_path: Path,
) -> None:
    huge = np.broadcast_to(np.zeros(1, np.float32), 2**48)
    with pytest.raises(
        SnapshotError, match=rf"needs 1,073,741,824\.0 MiB, {tmp_path} has [\d,.]+ MiB free"
    ):
        snapshot.write(tmp_path, tensors={"model": {"x": huge}}, manifest={}, snapshot_id="1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(19, injected="a file size limit reached while a snapshot is written")
def test_a_disk_that_fills_while_writing_leaves_the_old_snapshot_and_no_temporary_folder(
    tmp_path: Path,
) -> None:
    old = write(tmp_path, 1)

    def fill() -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (64 << 10, 64 << 10)
        )  # writes fail from here on, as on a full disk
        with pytest.raises(
            SnapshotError,
            match=r"cannot write snapshot .*00000002.* MiB free there now, nothing was left behind",
        ):
            write(tmp_path, 2, tensors={"model": {"x": np.zeros(1 << 20)}})

    assert in_child(fill) == 0
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert snapshot.newest(tmp_path) == old
    assert snapshot.newest(tmp_path) != write(tmp_path, 2)


STEPS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def stop_before_step(n: int) -> None:
    """From here on the n-th step that touches the disk ends this process as SIGKILL would."""
    left = [n]

    def guarded(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return step(*args, **keywords)

        return call

    for name in STEPS:
        setattr(os, name, guarded(getattr(os, name)))
    snapshot.safetensors.numpy.save_file = guarded(snapshot.safetensors.numpy.save_file)


def crash_at_each_step(work: Callable[[], object], inspect: Callable[[], object]) -> int:
    """Run `work` in children that die before step 0, 1, 2, ... and `inspect` after each death; how many steps there were."""

    def doomed(step: int) -> Callable[[], None]:
        def run() -> None:
            stop_before_step(step)
            work()

        return run

    for step in range(100):
        if (code := in_child(doomed(step))) == 0:
            return step
        assert code == 9
        inspect()
    raise AssertionError("work never came to its end")


@pytest.mark.fault(2, injected="death before every system call that touches the disk: writing")
def test_a_crash_before_any_step_of_writing_leaves_the_old_snapshot_or_a_complete_new_one(
    tmp_path: Path,
) -> None:
    old = write(tmp_path, 1)
    new = old.with_name(snapshot.new_id(2, 0))
    newer = {"model": {"table": np.ones((3, 4), np.float32)}, "joiner": TENSORS["joiner"]}
    seen = set()

    def inspect() -> None:
        for name in snapshot.snapshot_ids(tmp_path):
            assert same(snapshot.load(tmp_path / name)[1], TENSORS if name == old.name else newer)
        seen.add(found := snapshot.newest(tmp_path))
        snapshot.clean(tmp_path)
        assert not list(tmp_path.glob("tmp-*"))
        if found == new:
            os.rename(new, tmp_path / "tmp-done")
            snapshot.clean(tmp_path)

    assert crash_at_each_step(lambda: write(tmp_path, 2, newer), inspect) >= 8
    assert seen == {old, new}


@pytest.mark.fault(2, injected="the same: retention")
def test_a_crash_before_any_step_of_retention_never_shows_half_a_snapshot(tmp_path: Path) -> None:
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


@pytest.mark.fault(2, injected="the same: publishing")
def test_a_crash_before_any_step_of_publishing_leaves_the_old_pointer_or_the_new_one(
    tmp_path: Path,
) -> None:
    first, second = (
        snapshot.pointer_for(path, snapshot.verify(path))
        for path in (write(tmp_path / "s", 1), write(tmp_path / "s", 2))
    )
    latest = tmp_path / "latest.json"
    snapshot.write_pointer(latest, first)

    def inspect() -> None:
        assert snapshot.read_pointer(latest) in (first, second)

    assert crash_at_each_step(lambda: snapshot.write_pointer(latest, second), inspect) == 3
    assert snapshot.read_pointer(latest) == second


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(fd: int) -> None:
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def noted_rename(source: Path, target: Path) -> None:
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    name = write(tmp_path).name
    assert order == [
        "model.safetensors",
        "joiner.safetensors",
        "manifest.json",
        f"tmp-{snapshot.OWN}-{name}",
        "rename",
        tmp_path.name,
    ]


def test_the_newest_snapshot_that_verifies_is_used_and_the_reason_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    assert snapshot.newest(tmp_path) == bad
    damage(bad / "model.safetensors", -1)
    with caplog.at_level(logging.WARNING):
        assert snapshot.newest(tmp_path) == good
    assert "00000002-19700101T000000Z is not used" in caplog.text
    assert "model.safetensors has SHA-256" in caplog.text


def test_snapshots_of_which_none_verifies_are_an_error_and_no_snapshots_are_none(
    tmp_path: Path,
) -> None:
    assert snapshot.newest(tmp_path / "nowhere") is None
    (tmp_path / "tmp-00000009").mkdir()
    assert snapshot.newest(tmp_path) is None
    for sequence in (1, 2):
        damage(write(tmp_path, sequence) / "model.safetensors", 20)
    with pytest.raises(
        SnapshotError,
        match=r"none of the 2 snapshots in .* verifies; the newest: .*00000002.*model\.safetensors",
    ):
        snapshot.newest(tmp_path)


def test_retention_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    names = [write(tmp_path, sequence).name for sequence in range(1, 6)]
    assert snapshot.retain(tmp_path, 2, protect=[names[0]]) == names[1:3]
    assert snapshot.snapshot_ids(tmp_path) == [names[0], *names[3:]]
    assert not list(tmp_path.glob("tmp-*"))
    with pytest.raises(SnapshotError, match="at least one"):
        snapshot.retain(tmp_path, 0)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**8 - 1), st.integers(-(10**12), 10**13)),
        min_size=2,
        max_size=2,
        unique_by=lambda pair: pair[0],
    )
)
def test_ids_sort_by_sequence_whatever_the_event_time(pairs: list[tuple[int, int]]) -> None:
    names = [snapshot.new_id(*pair) for pair in sorted(pairs)]
    assert names == sorted(names)


def test_a_pointer_leads_to_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(Path("snapshots"), 7)
    pointer = snapshot.pointer_for(path, snapshot.verify(path))
    snapshot.write_pointer(tmp_path / "latest.json", pointer)
    found = snapshot.read_pointer(tmp_path / "latest.json")
    assert found == pointer
    assert {name: found[name] for name in MANIFEST} == MANIFEST
    monkeypatch.chdir("/")
    assert same(
        snapshot.load(Path(found["path"]), manifest_sha256=found["manifest_sha256"])[1], TENSORS
    )


def test_a_pointer_to_another_manifest_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(
        SnapshotError, match=r"manifest\.json has SHA-256 .*, its pointer says 0000"
    ):
        snapshot.load(path, manifest_sha256="0" * 64)


def test_a_manifest_without_what_a_pointer_needs_is_refused_by_field(tmp_path: Path) -> None:
    path = snapshot.write(
        tmp_path, tensors=TENSORS, manifest={**MANIFEST, "epoch": None}, snapshot_id="1"
    )
    with pytest.raises(SnapshotError, match="pointer field 'epoch' must be int, got None"):
        snapshot.pointer_for(path, snapshot.verify(path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 9}, "has format 9"),
        ({"format": True}, "has format True"),
        ({"epoch": True}, "'epoch' must be int, got True"),
        ({"epoch": "1"}, "'epoch' must be int"),
        ({"path": "snapshots/1"}, "must be absolute"),
        ({"path": "/snapshots/2"}, "must be absolute and end in the snapshot's name '1'"),
        ({"snapshot": "..", "path": "/snapshots/.."}, "not a plain name"),
        ({"manifest_sha256": "f00"}, "64 hexadecimal digits"),
    ],
)
def test_a_pointer_with_a_wrong_field_is_refused(change: dict[str, object], reason: str) -> None:
    good = {
        **MANIFEST,
        "format": 1,
        "snapshot": "1",
        "path": "/snapshots/1",
        "manifest_sha256": "0" * 64,
    }
    assert snapshot.verify_pointer(good) == good
    with pytest.raises(SnapshotError, match=reason):
        snapshot.verify_pointer({**good, **change})


def test_a_pointer_file_that_is_absent_is_none_and_one_that_is_torn_is_an_error(
    tmp_path: Path,
) -> None:
    latest = tmp_path / "latest.json"
    assert snapshot.read_pointer(latest) is None
    for text, reason in [
        ("", "not JSON"),
        ('{"format"', "not JSON"),
        ("[]", "a pointer is a JSON object, got list"),
    ]:
        latest.write_text(text)
        with pytest.raises(SnapshotError, match=reason):
            snapshot.read_pointer(latest)


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
def test_the_hash_of_weights_tells_names_shapes_dtypes_and_single_bits_apart(
    other: dict[str, Any],
) -> None:
    weights = {"w": np.zeros((3, 2), np.float32), "b": np.ones(1)}
    assert snapshot.weights_sha256(other) != snapshot.weights_sha256(weights)


def test_the_hash_of_weights_is_of_the_values_and_not_of_their_layout() -> None:
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = sha256(b'["w", "<f4", [2, 3]]\n' + struct.pack("<6f", *range(6))).hexdigest()
    for same_w in (w, np.asfortranarray(w), w.astype(">f4"), np.repeat(w, 2, axis=1)[:, ::2]):
        assert snapshot.weights_sha256({"w": same_w}) == expected
