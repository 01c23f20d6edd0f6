"""Pointers and deltas at a URL come as they do from a state directory, whatever the server does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.deltas import Made, chain
from support.keys import write_keys
from support.manifests import RUN
from support.patience import PATIENCE_SECONDS
from support.served import publish, write_served
from support.web_servers import FaultyServer

from stream_ctr.errors import SnapshotError
from stream_ctr.snapshots import remote
from stream_ctr.snapshots.cache import SnapshotCache
from stream_ctr.snapshots.delta import Delta, DeltaRank, Unsigned
from stream_ctr.snapshots.delta_sources import NotReadable
from stream_ctr.snapshots.delta_store import DeltaStore
from stream_ctr.snapshots.places import LocalPlace, Unreachable, open_place
from stream_ctr.snapshots.remote import PlaceDeltas, UrlPointers, served_files
from stream_ctr.snapshots.signing import PublicKey, SigningKey


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def server(state: Path) -> Iterator[FaultyServer]:
    with FaultyServer(state) as found:
        yield found


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_RETRY_SECONDS", 0.05)


def pointers_at(url: str, tmp_path: Path, **options: Any) -> UrlPointers:
    cache = SnapshotCache(tmp_path / "cache", served_files(None, "torch"))
    return UrlPointers(open_place(url), cache, **options)


def deltas_at(url: str, **options: Any) -> PlaceDeltas:
    return PlaceDeltas(open_place(url), every_seconds=0.0, **options)


def keep(state: Path, links: list[Made]) -> DeltaStore:
    store = DeltaStore(state)
    for link in links:
        store.write(link.header_bytes, link.header, link.payload)
    return store


def polled(source: PlaceDeltas, seconds: float = 0.0) -> list[Delta]:
    found = source.poll(seconds)
    assert all(isinstance(each, Delta) for each in found), found
    return [each for each in found if isinstance(each, Delta)]


# -- pointers ------------------------------------------------------------------------------------


def test_a_pointer_at_a_url_is_returned_once_and_located(
    state: Path, server: FaultyServer, tmp_path: Path
) -> None:
    source = pointers_at(server.url, tmp_path, every_seconds=0.0)
    assert (source.poll(0.0), source.holder) == ([], None)
    pointer = publish(write_served(state / "snapshots"))
    assert source.poll(PATIENCE_SECONDS) == [pointer]
    assert source.holder == RUN
    assert source.poll(0.0) == []
    path = source.locate(pointer)
    assert path.name == pointer.snapshot
    assert (tmp_path / "cache") in path.parents


def test_the_pointer_is_not_asked_for_more_than_once_a_second(
    state: Path, server: FaultyServer, tmp_path: Path
) -> None:
    publish(write_served(state / "snapshots"))
    source = pointers_at(server.url, tmp_path)
    for _ in range(100):
        source.poll(0.0)
    assert server.asked["/latest.json"] == 1


def test_a_damaged_pointer_is_an_error_once(
    state: Path, server: FaultyServer, tmp_path: Path
) -> None:
    publish(write_served(state / "snapshots"))
    server.changed = True
    source = pointers_at(server.url, tmp_path, every_seconds=0.0)
    (error,) = source.poll(0.0)
    assert isinstance(error, SnapshotError)
    assert "latest.json is damaged" in str(error)
    assert source.poll(0.0) == []
    server.changed = False
    assert len(source.poll(0.0)) == 1


def test_a_url_that_cannot_be_read_is_an_error_of_the_source(
    state: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.status = 503
    publish(write_served(state / "snapshots"))
    with pytest.raises(Unreachable, match="503"):
        pointers_at(server.url, tmp_path).poll(0.0)


# -- deltas --------------------------------------------------------------------------------------


def test_deltas_at_a_url_come_in_order_and_again_when_rewound(
    state: Path, server: FaultyServer
) -> None:
    source = deltas_at(server.url)
    assert polled(source) == []
    links = chain(3)
    store = keep(state, links)
    assert polled(source, PATIENCE_SECONDS) == [link.delta for link in links]
    assert polled(source) == []
    more = chain(5)[3:]
    for link in more:
        store.write(link.header_bytes, link.header, link.payload)
    assert polled(source, PATIENCE_SECONDS) == [link.delta for link in more]
    source.rewind()
    assert polled(source) == [link.delta for link in [*links, *more]]
    server.asked.clear()
    source.rewind((RUN, DeltaRank(3, 4)))
    assert polled(source) == [more[1].delta]
    assert sum(server.asked.values()) == 3  # the index, a header and a payload
    source.rewind(("f" * 32, DeltaRank(9, 9)))
    assert len(polled(source)) == 5


def test_deltas_that_expired_are_passed_over(state: Path, server: FaultyServer) -> None:
    links = chain(3)
    store = keep(state, links)
    source = deltas_at(server.url)
    assert len(polled(source)) == 3
    source.rewind()
    store.retain({"another": None}, most_bytes=1)
    assert polled(source) == [links[2].delta]


def test_a_poll_is_bounded_in_bytes(
    state: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = chain(3)
    keep(state, links)
    monkeypatch.setattr(remote, "POLL_BYTES", 1)
    source = deltas_at(server.url)
    assert [polled(source) for _ in range(3)] == [[link.delta] for link in links]


def test_a_damaged_delta_is_named_once_and_those_after_it_come(
    state: Path, server: FaultyServer
) -> None:
    links = chain(3)
    keep(state, links)
    server.only = "00000003-00000002.safetensors"
    server.changed = True
    source = deltas_at(server.url)
    first, error, last = source.poll(0.0)
    assert (first, last) == (links[0].delta, links[2].delta)
    assert "00000003-00000002" in str(error)
    assert "SHA-256" in str(error)
    assert source.counts == {"damaged": 1}
    server.changed = False
    assert polled(source, PATIENCE_SECONDS) == [links[1].delta]


def test_another_delta_of_the_same_rank_is_refused(state: Path, server: FaultyServer) -> None:
    link = chain(1)[0]
    keep(state, [link])
    other = chain(1, examples=7)[0]
    (state / "deltas" / f"{link.header.rank.name}.json").write_bytes(other.header_bytes)
    source = deltas_at(server.url)
    (error,) = source.poll(0.0)
    assert "the index says" in str(error)


def test_a_place_that_is_away_is_said_once_and_read_again(
    state: Path, server: FaultyServer
) -> None:
    links = chain(2)
    keep(state, links)
    server.status = 503
    server.only = "00000003-00000002"
    source = deltas_at(server.url)
    first, error = source.poll(0.0)
    assert first == links[0].delta
    assert isinstance(error, NotReadable)
    assert source.poll(0.3) == []
    server.status = 0
    assert polled(source, PATIENCE_SECONDS) == [links[1].delta]
    assert source.counts == {"away": 1}


def test_a_damaged_index_is_said_once(state: Path, server: FaultyServer) -> None:
    links = chain(1)
    keep(state, links)
    server.changed = True
    source = deltas_at(server.url)
    (error,) = source.poll(0.0)
    assert isinstance(error, NotReadable)
    assert source.poll(0.0) == []
    server.changed = False
    assert polled(source, PATIENCE_SECONDS) == [links[0].delta]
    assert source.counts == {"index": 1}


def test_deltas_without_the_signature_are_refused(state: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "own")
    links = chain(1)
    keep(state, links)
    source = PlaceDeltas(LocalPlace(state), signature=PublicKey(public).verify, every_seconds=0.0)
    (error,) = source.poll(0.0)
    assert isinstance(error, Unsigned)
    signed = chain(2, sign=SigningKey(private).sign)[1]
    keep(state, [signed])
    assert polled(source) == [signed.delta]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_delta_comes_in_the_end_and_none_is_another(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("state")
    links = chain(4)
    faults = st.sampled_from(["none", "changed", "status", "break"])
    with FaultyServer(folder) as server:
        source = PlaceDeltas(open_place(server.url), every_seconds=0.0)
        found: list[Delta] = []
        for link in links:
            keep(folder, [link])
            fault = data.draw(faults)
            server.only = data.draw(st.sampled_from(["", "json", "safetensors", "index"]))
            server.changed = fault == "changed"
            server.status = 500 if fault == "status" else 0
            server.break_after = data.draw(st.integers(0, 300)) if fault == "break" else None
            found += [each for each in source.poll(0.0) if isinstance(each, Delta)]
        server.changed, server.status, server.break_after = False, 0, None
        while len(found) < len(links):
            found += polled(source, PATIENCE_SECONDS)
    assert sorted(delta.header.rank for delta in found) == [link.header.rank for link in links]
    assert {delta.sha256 for delta in found} == {link.sha256 for link in links}
