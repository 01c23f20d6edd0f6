"""The cache holds what serving needs of a few snapshots, verified, whatever happens on the way."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.keys import write_keys
from support.patience import wait_until
from support.processes import in_child
from support.served import ROWS, publish, write_blend, write_served
from support.snapshots import crash_at_each_step, flip_bit
from support.web_servers import FaultyServer

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import cache as caches
from stream_ctr.snapshots.cache import SnapshotCache, default_cache
from stream_ctr.snapshots.places import LocalPlace, open_place
from stream_ctr.snapshots.pointer import Pointer
from stream_ctr.snapshots.remote import served_files
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.signing import PublicKey, SigningKey


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def faulty(state: Path) -> Iterator[FaultyServer]:
    state.mkdir()
    with FaultyServer(state) as server:
        yield server


def write(state: Path, sequence: int = 1, **changes: Any) -> Pointer:
    path = write_served(state / "snapshots", seed=sequence, sequence=sequence, **changes)
    return publish(path)


def cache_in(folder: Path, model: str | None = None, **options: Any) -> SnapshotCache:
    return SnapshotCache(folder / "cache", served_files(model, "torch"), **options)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir())


def test_only_what_serving_needs_is_downloaded_and_serves(state: Path, tmp_path: Path) -> None:
    pointer = write(state)
    path = cache_in(tmp_path).fetch(LocalPlace(state), pointer)
    assert path == tmp_path / "cache" / pointer.manifest_sha256 / pointer.snapshot
    assert sorted(each.name for each in path.iterdir()) == ["manifest.json", "model.safetensors"]
    original = Scorer(state / "snapshots" / pointer.snapshot)
    assert Scorer(path).predict(ROWS).tolist() == original.predict(ROWS).tolist()


def test_another_model_of_a_snapshot_is_added_to_what_is_there(state: Path, tmp_path: Path) -> None:
    pointer = write(state)
    first, second = cache_in(tmp_path), cache_in(tmp_path, "ftrl")
    first.fetch(LocalPlace(state), pointer)
    path = second.fetch(LocalPlace(state), pointer)
    names = ["ftrl.model.safetensors", "manifest.json", "model.safetensors"]
    assert sorted(each.name for each in path.iterdir()) == names
    original = Scorer(state / "snapshots" / pointer.snapshot, model="ftrl")
    found = Scorer(path, model="ftrl").predict(ROWS).tolist()
    assert found == original.predict(ROWS).tolist()


def test_all_members_of_a_blend_are_downloaded(state: Path, tmp_path: Path) -> None:
    pointer = publish(write_blend(state / "snapshots"))
    path = cache_in(tmp_path).fetch(LocalPlace(state), pointer)
    assert not {"fm.model.safetensors", "joiner.safetensors"} & {p.name for p in path.iterdir()}
    original = Scorer(state / "snapshots" / pointer.snapshot)
    assert Scorer(path).predict(ROWS).tolist() == original.predict(ROWS).tolist()


def test_a_model_that_the_snapshot_lacks_is_an_error(state: Path, tmp_path: Path) -> None:
    pointer = write(state)
    with pytest.raises(SnapshotError, match="no model 'fnn'"):
        cache_in(tmp_path, "fnn").fetch(LocalPlace(state), pointer)


def test_the_last_used_snapshots_stay_and_those_in_use(state: Path, tmp_path: Path) -> None:
    pointers = [write(state, sequence) for sequence in (1, 2, 3, 4)]
    names = [pointer.manifest_sha256 for pointer in pointers]
    place = LocalPlace(state)
    reader = cache_in(tmp_path)
    reader.fetch(place, pointers[0])
    follower = cache_in(tmp_path, keep=2)
    for pointer in pointers[1:]:
        follower.fetch(place, pointer)
    assert entries(tmp_path) == sorted([names[0], names[2], names[3]])
    reader.close()
    follower.fetch(place, pointers[1])
    assert entries(tmp_path) == sorted([names[1], names[3]])


def test_damage_in_the_cache_is_repaired(state: Path, tmp_path: Path) -> None:
    pointer = write(state)
    cache = cache_in(tmp_path)
    path = cache.fetch(LocalPlace(state), pointer)
    for name in ("model.safetensors", "manifest.json"):
        flip_bit(path / name, 100)
        assert cache.fetch(LocalPlace(state), pointer) == path
        Scorer(path, manifest_sha256=pointer.manifest_sha256)
    (path / "model.safetensors").write_bytes(b"")
    (path / "stranger").write_bytes(b"")
    cache.fetch(LocalPlace(state), pointer)
    Scorer(path)


def test_a_manifest_that_is_not_the_pointers_is_refused(state: Path, tmp_path: Path) -> None:
    pointer = write(state)
    flip_bit(state / "snapshots" / pointer.snapshot / "manifest.json", 100)
    with pytest.raises(SnapshotError, match="manifest.json has SHA-256 .*, its pointer says"):
        cache_in(tmp_path).fetch(LocalPlace(state), pointer)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_signatures_are_verified_before_the_weights_are_downloaded(
    state: Path, tmp_path: Path, faulty: FaultyServer
) -> None:
    private, public = write_keys(tmp_path, "own")
    _, foreign = write_keys(tmp_path, "foreign")
    pointer = write(state, sign=SigningKey(private).sign)
    place = open_place(faulty.url)
    with pytest.raises(SnapshotError, match="not that of the expected key"):
        cache_in(tmp_path, signature=PublicKey(foreign).verify).fetch(place, pointer)
    assert not any(path.endswith("safetensors") for path in faulty.asked)
    signed = cache_in(tmp_path, signature=PublicKey(public).verify)
    assert (signed.fetch(place, pointer) / "manifest.sig").stat().st_size == 64
    unsigned = write(state, 2)
    with pytest.raises(SnapshotError, match="is not signed"):
        signed.fetch(place, unsigned)


def test_a_size_that_the_manifest_does_not_say_is_refused_before_a_byte_is_written(
    state: Path, tmp_path: Path
) -> None:
    pointer = write(state)
    with (state / "snapshots" / pointer.snapshot / "model.safetensors").open("ab") as file:
        file.truncate(1 << 40)  # takes no room here, and would take all of it in the cache
    with pytest.raises(SnapshotError, match="has 1,099,511,627,776 bytes, the manifest says"):
        cache_in(tmp_path).fetch(LocalPlace(state), pointer)
    assert not list((tmp_path / "cache").rglob("*model*"))


def test_a_disk_without_room_is_an_error_before_the_download(
    state: Path, tmp_path: Path, faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer = write(state)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SnapshotError, match="0.0 MiB free, and .* needed: make room"):
        cache_in(tmp_path).fetch(open_place(faulty.url), pointer)
    assert not any(path.endswith("safetensors") for path in faulty.asked)


def test_a_crash_at_any_step_leaves_nothing_that_is_loaded_and_is_made_good(
    state: Path, tmp_path: Path
) -> None:
    pointers = [write(state, sequence) for sequence in (1, 2)]
    expected = Scorer(state / "snapshots" / pointers[1].snapshot).predict(ROWS).tolist()
    place = LocalPlace(state)

    def work() -> None:
        cache = cache_in(tmp_path, keep=1)
        for pointer in pointers:
            cache.fetch(place, pointer)

    def inspect() -> None:
        path = cache_in(tmp_path, keep=1).fetch(place, pointers[1])
        scorer = Scorer(path, manifest_sha256=pointers[1].manifest_sha256)
        assert scorer.predict(ROWS).tolist() == expected

    assert crash_at_each_step(work, inspect) >= 1
    assert entries(tmp_path) == [pointers[1].manifest_sha256]


def test_processes_that_share_a_cache_download_once(
    state: Path, tmp_path: Path, faulty: FaultyServer
) -> None:
    pointer = write(state)
    faulty.only = "model.safetensors"
    faulty.delay_seconds = 0.02
    faulty.delay_bytes = 1024
    found: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(cache_in(tmp_path).fetch(open_place(faulty.url), pointer))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert faulty.asked[f"/snapshots/{pointer.snapshot}/model.safetensors"] == 1
    Scorer(found[0])


def test_a_cache_that_another_process_cleans_is_still_right(state: Path, tmp_path: Path) -> None:
    pointers = [write(state, sequence) for sequence in range(1, 7)]
    expected = {
        pointer.snapshot: Scorer(state / "snapshots" / pointer.snapshot).predict(ROWS).tolist()
        for pointer in pointers
    }
    place = LocalPlace(state)

    def follow(order: list[Pointer]) -> None:
        cache = cache_in(tmp_path, keep=1)
        for pointer in order * 5:
            scorer = Scorer(cache.fetch(place, pointer))
            assert scorer.predict(ROWS).tolist() == expected[pointer.snapshot]

    def work() -> None:
        follow(pointers)

    children = [threading.Thread(target=lambda: codes.append(in_child(work))) for _ in range(2)]
    codes: list[int] = []
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert codes == [0, 0]


def test_closing_ends_a_download(state: Path, tmp_path: Path, faulty: FaultyServer) -> None:
    pointer = write(state)
    faulty.only = "model.safetensors"
    faulty.delay_seconds = 0.1
    faulty.delay_bytes = 10
    cache = cache_in(tmp_path)
    errors: list[SnapshotError] = []

    def work() -> None:
        with pytest.raises(SnapshotError, match="was stopped") as caught:
            cache.fetch(open_place(faulty.url), pointer)
        errors.append(caught.value)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: any(faulty.sent.values()) and list(tmp_path.rglob("tmp-model*")))
    cache.close()
    thread.join()
    assert errors


def test_waiting_for_another_process_ends(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "_PATIENCE_SECONDS", 0.1)
    pointer = write(state)
    first = cache_in(tmp_path)
    first.fetch(LocalPlace(state), pointer)
    with (
        first._locked(tmp_path / "cache" / pointer.manifest_sha256),
        pytest.raises(SnapshotError, match="another process has been downloading"),
    ):
        cache_in(tmp_path).fetch(LocalPlace(state), pointer)


def test_the_cache_is_in_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache() == Path("/caches/stream-ctr/snapshots")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache() == Path("/home/me/.cache/stream-ctr/snapshots")
