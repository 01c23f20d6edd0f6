"""A mirror has what servers need of a state directory, and never a pointer without its snapshot."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import command, succeed
from support.deltas import chain
from support.keys import write_keys
from support.manifests import RUN, edit_json, make_newer
from support.patience import wait_until
from support.served import ROWS, publish, write_blend, write_served

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.snapshots import mirror as mirrors
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.delta_store import DeltaStore, decode_index
from stream_ctr.snapshots.lease import TakenOver
from stream_ctr.snapshots.mirror import DeltaMirror, SnapshotMirror, mirror_at
from stream_ctr.snapshots.places import LocalPlace, Place, Unreachable, open_place
from stream_ctr.snapshots.pointer import Pointer, read_pointer
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import PublicKey, SigningKey

OTHER = "f" * 32


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def write(state: Path, sequence: int = 1, **changes: Any) -> Pointer:
    path = write_served(state / "snapshots", seed=sequence, sequence=sequence, **changes)
    return publish(path)


def nothing() -> None:
    pass


def snapshots_to(place: Place, state: Path, check: Callable[[], None] = nothing) -> SnapshotMirror:
    return SnapshotMirror(state, place, run=RUN, check=check)


def deltas_to(place: Place, state: Path) -> DeltaMirror:
    return DeltaMirror(state, place, run=RUN, check=nothing)


def stored(copy: Path) -> list[str]:
    return sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())


class Spy(LocalPlace):
    """A place that keeps the order of what is written, and fails from one write on."""

    def __init__(self, directory: Path, fail_at: int = 1 << 30) -> None:
        super().__init__(directory)
        self.written: list[str] = []
        self.removed: list[str] = []
        self.fail_at = fail_at

    def write(self, name: str, data: bytes | Path) -> None:
        if len(self.written) >= self.fail_at:
            raise Unreachable(f"cannot write {name}: no answer")
        self.written.append(name)
        super().write(name, data)

    def remove(self, name: str) -> None:
        self.removed.append(name)
        super().remove(name)


# -- snapshots -----------------------------------------------------------------------------------


def test_a_mirror_has_what_serves_and_the_pointer_comes_last(state: Path, copy: Path) -> None:
    path = write_blend(state / "snapshots")
    pointer = publish(path)
    place = Spy(copy)
    snapshots_to(place, state)()
    folder = f"snapshots/{pointer.snapshot}"
    stems = ("model", "deepfm.model", "fnn.model", "ftrl.model", "fm.model")
    assert sorted(place.written[:-2]) == sorted(f"{folder}/{stem}.safetensors" for stem in stems)
    assert place.written[-2:] == [f"{folder}/manifest.json", "latest.json"]
    assert (path / "joiner.safetensors").exists()
    assert read_pointer(copy / "latest.json") == pointer
    for model in (None, "fm"):
        expected = Scorer(path, model=model).predict(ROWS).tolist()
        assert Scorer(copy / folder, model=model).predict(ROWS).tolist() == expected


def test_signatures_and_graphs_are_mirrored(state: Path, copy: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "own")
    learned = write(state)
    described = snapshot.read_manifest(state / "snapshots" / learned.snapshot)
    tensors = snapshot.load(state / "snapshots" / learned.snapshot)[1]
    signed = snapshot.write(
        tmp_path / "signed" / "snapshots",
        tensors=tensors,
        manifest=described,
        graphs={"model": b"a graph"},
        sign=SigningKey(private).sign,
    )
    publish(signed)
    snapshots_to(LocalPlace(copy), tmp_path / "signed")()
    names = {path.name for path in (copy / "snapshots" / signed.name).iterdir()}
    assert {"manifest.sig", "model.onnx"} < names
    Scorer(copy / "snapshots" / signed.name, signature=PublicKey(public).verify)


@pytest.mark.parametrize("fail_at", range(7))
def test_a_reader_never_sees_a_pointer_whose_snapshot_is_not_there(
    state: Path, copy: Path, fail_at: int
) -> None:
    place = Spy(copy)
    first = write(state, 1)
    mirror = snapshots_to(place, state)
    mirror()
    second = write(state, 2)
    place.fail_at = len(place.written) + fail_at
    failed = False
    try:
        mirror()
    except Unreachable:
        failed = True
    seen = read_pointer(copy / "latest.json")
    assert seen == (first if failed else second)
    Scorer(copy / "snapshots" / seen.snapshot, manifest_sha256=seen.manifest_sha256)
    assert failed == (fail_at < 4)
    place.fail_at = 1 << 30
    mirror()
    assert read_pointer(copy / "latest.json") == second
    assert len(place.written) == len({*place.written}) + 1  # only latest.json comes twice


def test_what_the_directory_removes_is_removed_from_the_mirror(state: Path, copy: Path) -> None:
    mirror = snapshots_to(LocalPlace(copy), state)
    names = []
    for sequence in (1, 2, 3):
        names.append(write(state, sequence).snapshot)
        mirror()
    (copy / "snapshots" / "mine").mkdir()
    assert len(list((copy / "snapshots").iterdir())) == 4
    snapshot.retain(state / "snapshots", 1)
    names.append(write(state, 4).snapshot)
    mirror()
    found = sorted(path.name for path in (copy / "snapshots").iterdir())
    assert found == [*names[2:], "mine"]


def test_a_rollback_reaches_the_mirror_and_sends_no_file_again(state: Path, copy: Path) -> None:
    place = Spy(copy)
    mirror = snapshots_to(place, state)
    first = write(state, 1)
    mirror()
    write(state, 2)
    mirror()
    count = len(place.written)
    back = publish(state / "snapshots" / first.snapshot, epoch=9)
    mirror()
    assert place.written[count:] == ["latest.json"]
    assert read_pointer(copy / "latest.json") == back


def test_a_mirror_that_is_complete_is_not_sent_again(state: Path, copy: Path) -> None:
    write(state)
    snapshots_to(LocalPlace(copy), state)()
    again = Spy(copy)
    mirror = snapshots_to(again, state)
    mirror()
    mirror()
    assert again.written == []


def test_the_mirror_of_another_run_is_not_touched(state: Path, copy: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", 1, run=OTHER)
    SnapshotMirror(tmp_path / "other", LocalPlace(copy), run=OTHER, check=nothing)()
    before = stored(copy)
    write(state, 2)
    with pytest.raises(SnapshotError, match=f"holds what run {OTHER} publishes, and this is run"):
        snapshots_to(LocalPlace(copy), state)()
    assert stored(copy) == before


def test_a_damaged_pointer_is_replaced_and_a_newer_one_is_not(state: Path, copy: Path) -> None:
    pointer = write(state)
    copy.mkdir()
    (copy / "latest.json").write_text("{")
    snapshots_to(LocalPlace(copy), state)()
    assert read_pointer(copy / "latest.json") == pointer
    make_newer(copy / "latest.json")
    with pytest.raises(NewerFormat):
        snapshots_to(LocalPlace(copy), state)()


def test_a_run_that_was_taken_over_publishes_nothing(state: Path, copy: Path) -> None:
    write(state)

    def taken_over() -> None:
        raise TakenOver("another process has it")

    with pytest.raises(TakenOver):
        snapshots_to(LocalPlace(copy), state, taken_over)()
    assert not (copy / "latest.json").exists()


def test_nothing_is_sent_before_anything_is_published(state: Path, copy: Path) -> None:
    write_served(state / "snapshots")
    snapshots_to(LocalPlace(copy), state)()
    deltas_to(LocalPlace(copy), state)()
    assert not copy.exists()


def test_a_manifest_that_is_not_the_pointers_is_not_sent(state: Path, copy: Path) -> None:
    pointer = write(state)
    edit_json(
        state / "snapshots" / pointer.snapshot / "manifest.json",
        lambda document: document.update(examples=1),
    )
    with pytest.raises(SnapshotError, match=r"manifest\.json is not the one of latest\.json"):
        snapshots_to(LocalPlace(copy), state)()
    assert not copy.exists()


# -- deltas --------------------------------------------------------------------------------------


def test_deltas_are_mirrored_before_the_index_that_lists_them(state: Path, copy: Path) -> None:
    store = DeltaStore(state)
    place = Spy(copy)
    mirror = deltas_to(place, state)
    links = chain(3)
    for link in links:
        store.write(link.header_bytes, link.header, link.payload)
        mirror()
    names = [link.header.rank.name for link in links]
    assert place.written == [
        f"deltas/{name}"
        for rank in names
        for name in (f"{rank}.safetensors", f"{rank}.json", "index.json")
    ]
    assert (copy / "deltas" / "index.json").read_bytes() == (
        state / "deltas" / "index.json"
    ).read_bytes()


def test_expired_deltas_are_removed_after_the_index(state: Path, copy: Path) -> None:
    store = DeltaStore(state)
    for link in chain(3):
        store.write(link.header_bytes, link.header, link.payload)
    deltas_to(LocalPlace(copy), state)()
    store.retain({"another": None}, most_bytes=1)
    deltas_to(LocalPlace(copy), state)()  # a run that is resumed
    assert len(stored(copy)) == 3
    link = chain(4)[-1]
    store.write(link.header_bytes, link.header, link.payload)
    place = Spy(copy)
    mirror = deltas_to(place, state)
    mirror()
    store.retain({"another": None}, most_bytes=1)
    mirror()
    removed = len(place.removed)
    link = chain(5)[-1]
    store.write(link.header_bytes, link.header, link.payload)
    mirror()
    assert len(place.removed) == removed == 2
    store.retain({"another": None}, most_bytes=1)
    mirror()
    assert stored(copy) == [
        "deltas/00000003-00000005.json",
        "deltas/00000003-00000005.safetensors",
        "deltas/index.json",
    ]


@pytest.mark.parametrize("fail_at", range(6))
def test_an_index_lists_only_what_is_there(state: Path, copy: Path, fail_at: int) -> None:
    store = DeltaStore(state)
    for link in chain(2):
        store.write(link.header_bytes, link.header, link.payload)
    place = Spy(copy, fail_at)
    mirror = deltas_to(place, state)
    with contextlib.suppress(Unreachable):
        mirror()
    if (copy / "deltas" / "index.json").exists():
        index = decode_index((copy / "deltas" / "index.json").read_bytes())
        assert len(stored(copy)) == 1 + 2 * len(index.deltas)
    assert (copy / "deltas" / "index.json").exists() == (fail_at == 5)
    place.fail_at = 1 << 30
    mirror()
    assert len(stored(copy)) == 5
    assert len({*place.written}) == 5


# -- the threads ---------------------------------------------------------------------------------


def test_the_threads_of_a_mirror_send_what_appears(state: Path, copy: Path) -> None:
    store = DeltaStore(state)
    with mirror_at(copy.as_uri(), state, run=RUN):
        pointer = write(state)
        wait_until(lambda: (copy / "latest.json").exists())
        link = chain(1)[0]
        store.write(link.header_bytes, link.header, link.payload)
        wait_until(lambda: (copy / "deltas" / "index.json").exists())
        last = write(state, 2)
    assert read_pointer(copy / "latest.json") == last != pointer


def test_an_object_store_is_a_mirror(state: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/run"
    with mirror_at(url, state, run=RUN):
        pointer = write(state)
    place = open_place(url)
    assert place.names(f"snapshots/{pointer.snapshot}") == [
        "ftrl.model.safetensors",
        "manifest.json",
        "model.safetensors",
    ]
    assert json.loads(place.read("latest.json", 10_000))["snapshot"] == pointer.snapshot


def test_failures_are_counted_logged_once_and_tried_again(
    state: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirrors, "_FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(mirrors, "_LAST_RETRY_SECONDS", 0.02)
    place = Spy(copy, fail_at=0)
    monkeypatch.setattr(mirrors, "open_place", lambda url, writing: place)
    with caplog.at_level(logging.ERROR), mirror_at("x", state, run=RUN) as mirror:
        pointer = write(state)
        wait_until(lambda: mirror.failures["snapshots"] > 3)
        assert mirror.failures["deltas"] == 0
        place.fail_at = 1 << 30
        wait_until(lambda: (copy / "latest.json").exists())
    assert read_pointer(copy / "latest.json") == pointer
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith("could not send snapshots to")
    assert len(caplog.records) == 1


def test_a_mirror_that_lacks_the_last_snapshot_is_an_error_at_the_end(
    state: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "open_place", lambda url, writing: Spy(copy, fail_at=0))
    with (
        pytest.raises(
            SnapshotError, match="does not have the last snapshots: cannot write .* the next"
        ),
        mirror_at("x", state, run=RUN),
    ):
        write(state)
    with pytest.raises(ZeroDivisionError), mirror_at("x", state, run=RUN):  # the first error counts
        raise ZeroDivisionError


def test_a_place_that_hangs_holds_nobody_up(
    state: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    class Hanging(LocalPlace):
        def write(self, name: str, data: bytes | Path) -> None:
            released.wait()

    monkeypatch.setattr(mirrors, "open_place", lambda url, writing: Hanging(copy))
    began = time.monotonic()

    def run() -> None:
        with mirror_at("x", state, run=RUN, patience_seconds=0.2) as mirror:
            for sequence in (1, 2, 3):
                write(state, sequence)
                mirror.wake()

    with pytest.raises(SnapshotError, match="it takes more than 0.2 s"):
        run()
    released.set()
    assert time.monotonic() - began < 30


def test_the_command_copies_once(state: Path, copy: Path) -> None:
    assert command("snapshots", "mirror", state, copy.as_uri()).exit_code == 6
    pointer = write(state)
    assert command("snapshots", "mirror", state).exit_code == 3
    link = chain(1)[0]
    DeltaStore(state).write(link.header_bytes, link.header, link.payload)
    result = succeed("snapshots", "mirror", state, copy.as_uri())
    assert pointer.snapshot in result.output
    assert read_pointer(copy / "latest.json") == pointer
    assert len(list((copy / "deltas").iterdir())) == 3


def test_a_url_that_cannot_be_written_to_is_refused_at_the_start(state: Path) -> None:
    with pytest.raises(ConfigError, match="can only be read"):
        mirror_at("https://host/run", state, run=RUN)
