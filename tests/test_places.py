"""Places hold files under names, whatever holds them, and a transfer is whole or an error."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.patience import wait_until
from support.web_servers import FaultyServer, free_port, url_with, web_server

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.snapshots import places
from stream_ctr.snapshots.files import Missing
from stream_ctr.snapshots.places import (
    PIECE_BYTES,
    LocalPlace,
    Place,
    Unreachable,
    download,
    is_url,
    open_place,
    shown,
)

LARGE = bytes(range(256)) * (12 << 10)  # 3 MiB: several pieces


@pytest.fixture(params=["directory", "file URL", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place that can be written to."""
    if request.param == "memory":
        return open_place(f"memory://{uuid.uuid4().hex}/run")
    folder = tmp_path / "a place"
    return open_place(folder if request.param == "directory" else folder.as_uri(), writing=True)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyServer]:
    """A web server of the directory `served`, which holds the file `large`."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "large").write_bytes(LARGE)
    with FaultyServer(tmp_path / "served") as server:
        yield server


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def get(place: Place, target: Path, data: bytes = LARGE, name: str = "large", **more: Any) -> None:
    download(place, name, target, size=len(data), sha256=digest(data), **more)


# -- all places ------------------------------------------------------------------------------------


def test_what_is_written_is_read_until_it_is_removed(place: Place, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(LARGE)
    place.write("latest.json", b"first")
    place.write("latest.json", b"second")
    place.write("snapshots/a/model", tmp_path / "local")
    place.write("snapshots/b/model", b"")
    assert place.read("latest.json", 6) == b"second"
    assert place.read("snapshots/b/model", 6) == b""
    assert place.names("snapshots") == ["a", "b"]
    get(place, tmp_path / "copy", name="snapshots/a/model")
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert place.exists("snapshots/a")
    place.remove("snapshots/a")
    place.remove("snapshots/a")
    place.remove("latest.json")
    assert (place.exists("snapshots/a/model"), place.exists("latest.json")) == (False, False)
    assert place.names("snapshots") == ["b"]


def test_a_file_that_is_not_there_is_missing_everywhere(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"latest\.json"):
        place.read("latest.json", 100)
    with pytest.raises(Missing, match="model"):
        get(place, tmp_path / "copy", name="snapshots/a/model")
    assert place.names("snapshots") == []
    assert not (tmp_path / "copy").exists()


def test_no_more_is_read_than_was_asked_for(place: Place) -> None:
    place.write("large", LARGE)
    assert place.read("large", len(LARGE)) == LARGE
    with pytest.raises(SnapshotError, match="and the largest of its kind has 3,145,727"):
        place.read("large", len(LARGE) - 1)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a\nb", ".x"])
def test_a_name_does_not_lead_out_of_a_place(place: Place, name: str) -> None:
    for action in (lambda: place.read(name, 9), lambda: place.write(name, b"")):
        with pytest.raises(SnapshotError, match="is not a plain name"):
            action()


@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, 3 * PIECE_BYTES), start=st.integers(0, 3 * PIECE_BYTES))
def test_a_transfer_begins_where_the_last_one_broke_off(size: int, start: int) -> None:
    place = open_place(f"memory://{uuid.uuid4().hex}")
    data = LARGE[:size]
    place.write("file", data)
    with place.transfer("file", start) as transfer:
        assert (transfer.start, transfer.size) == (min(start, size), size)
        assert b"".join(transfer.pieces) == data[transfer.start :]


def test_a_reader_of_a_directory_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    place.write("latest.json", b"a" * 100_000)
    wrong: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if (data := place.read("latest.json", 100_000)) not in (b"a" * 100_000, b"b" * 99_999):
                wrong.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(50):
        place.write("latest.json", b"b" * 99_999)
        place.write("latest.json", b"a" * 100_000)
    done.set()
    thread.join()
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ["latest.json"]


# -- opening -------------------------------------------------------------------------------------


def test_a_package_that_is_not_installed_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = {"s3fs", "aiohttp"}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"s3://b/run needs s3fs, .* 'stream-ctr\[remote\]' s3fs"):
        open_place("s3://b/run")
    with pytest.raises(ConfigError, match=r"needs aiohttp, .*pip install 'stream-ctr\[remote\]'$"):
        open_place("http://host/run")
    absent.add("fsspec")
    with pytest.raises(ConfigError, match="needs fsspec"):
        open_place("memory://run")
    assert open_place("state").url == "state"


@pytest.mark.parametrize("url", ["simplecache::http://host/x", "github://a:b@main/x", "x://y"])
def test_only_known_schemes_are_opened(url: str) -> None:
    if is_url(url):
        with pytest.raises(ConfigError, match="its scheme is one of file, http, https, s3"):
            open_place(url)
    else:
        assert isinstance(open_place(url), LocalPlace)


def test_a_file_url_is_absolute_and_of_this_machine(tmp_path: Path) -> None:
    assert open_place("file:///srv/a%20b").url == "/srv/a b"
    for url in ("file://host/srv", "file://srv"):
        with pytest.raises(ConfigError, match="file:///absolute/path"):
            open_place(url)


def test_a_web_server_can_only_be_read(faulty: FaultyServer) -> None:
    with pytest.raises(ConfigError, match="can only be read: write to the directory that"):
        open_place(faulty.url, writing=True)
    place = open_place(faulty.url)
    for action in (
        lambda: place.write("x", b""),
        lambda: place.remove("x"),
        lambda: place.names("x"),
    ):
        with pytest.raises(ConfigError, match="can only be read"):
            action()


def test_directories_need_no_fsspec() -> None:
    code = (
        "import sys; from stream_ctr.snapshots.places import open_place;"
        "open_place('x').exists('y'); print('fsspec' in sys.modules, 'aiohttp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# -- a web server --------------------------------------------------------------------------------


def test_files_of_pythons_web_server_are_read(tmp_path: Path) -> None:
    (tmp_path / "served" / "run").mkdir(parents=True)
    (tmp_path / "served" / "run" / "large").write_bytes(LARGE)
    with web_server(tmp_path / "served") as url:
        place = open_place(f"{url}/run/")
        assert place.read("large", len(LARGE)) == LARGE
        assert (place.exists("large"), place.exists("small")) == (True, False)
        get(place, tmp_path / "copy")
        with pytest.raises(Missing, match=r"http://127.*/run/small: it is not there"):
            place.read("small", 9)
    assert (tmp_path / "copy").read_bytes() == LARGE
    with pytest.raises(Unreachable, match="cannot read"):
        place.read("large", len(LARGE))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_breaks_off_is_continued_or_begun_anew(
    faulty: FaultyServer, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_RETRY_SECONDS", 0.01)
    faulty.ranges = ranges
    faulty.break_after = 2 << 20
    place = open_place(faulty.url)
    if not ranges:
        with pytest.raises(Unreachable, match="large"):
            get(place, tmp_path / "copy")
        assert 0 < (tmp_path / "copy").stat().st_size < len(LARGE)
        faulty.break_after = None
        sent_before = faulty.sent["/large"]
        get(place, tmp_path / "copy")
        assert faulty.sent["/large"] - sent_before == len(LARGE)
    else:
        get(place, tmp_path / "copy")
        assert faulty.asked["/large"] in (2, 3)
        assert faulty.sent["/large"] < 2 * len(LARGE)
    assert (tmp_path / "copy").read_bytes() == LARGE


def test_what_a_crash_left_is_continued(faulty: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(LARGE[:1_000_000])
    get(open_place(faulty.url), tmp_path / "copy")
    assert faulty.sent["/large"] == len(LARGE) - 1_000_000
    get(open_place(faulty.url), tmp_path / "copy")
    assert faulty.asked["/large"] == 1


def test_changed_bytes_are_discarded(faulty: FaultyServer, tmp_path: Path) -> None:
    place = open_place(faulty.url)
    faulty.changed = True
    with pytest.raises(SnapshotError, match="SHA-256 .*, the manifest says .*: it was changed"):
        get(place, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (tmp_path / "copy").write_bytes(b"x" * 1000)  # the beginning of something else
    faulty.changed = False
    with pytest.raises(SnapshotError, match="SHA-256"):
        get(place, tmp_path / "copy")
    get(place, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == LARGE


@pytest.mark.parametrize("no_length", [False, True])
def test_a_file_of_another_size_is_refused(
    faulty: FaultyServer, tmp_path: Path, no_length: bool
) -> None:
    faulty.no_length = no_length
    place = open_place(faulty.url)
    few = LARGE[:100]
    with pytest.raises(SnapshotError, match="100") as caught:
        get(place, tmp_path / "copy", few)
    assert not isinstance(caught.value, Unreachable)
    copied = (tmp_path / "copy").stat().st_size if (tmp_path / "copy").exists() else None
    assert copied is None if not no_length else copied == 0
    with pytest.raises(SnapshotError, match="the largest of its kind has 100"):
        place.read("large", 100)


def test_a_server_that_says_nothing_is_given_up(
    faulty: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_SILENT_SECONDS", 0.2)
    monkeypatch.setattr(places, "_RETRY_SECONDS", 0.01)
    place = open_place(faulty.url)
    faulty.silent.set()
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no answer in time"):
        place.read("large", len(LARGE))
    with pytest.raises(Unreachable, match="no answer in time"):
        get(place, tmp_path / "copy")
    assert time.monotonic() - began < 30


def test_a_server_that_drips_is_given_up(
    faulty: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(places, "_RETRY_SECONDS", 0.01)
    (tmp_path / "served" / "small").write_bytes(LARGE[:1000])
    faulty.delay_seconds = 0.05
    place = open_place(faulty.url)
    with pytest.raises(Unreachable, match=r"[0-9] bytes came in 0 s"):
        place.read("small", 1000)
    with pytest.raises(Unreachable, match=r"[0-9] bytes came in 0 s"):
        get(place, tmp_path / "copy", LARGE[:1000], name="small")


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_refusal_is_named(faulty: FaultyServer, status: int) -> None:
    faulty.status = status
    with pytest.raises(Unreachable, match=f"large: HTTP status {status}$"):
        open_place(faulty.url).read("large", len(LARGE))


def test_a_download_can_be_stopped(faulty: FaultyServer, tmp_path: Path) -> None:
    faulty.delay_seconds = 0.05
    faulty.delay_bytes = 10_000
    stop = threading.Event()
    errors: list[SnapshotError] = []

    def work() -> None:
        with pytest.raises(SnapshotError, match="was stopped") as caught:
            get(open_place(faulty.url), tmp_path / "copy", stopped=stop.is_set)
        errors.append(caught.value)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: faulty.sent["/large"])
    stop.set()
    thread.join()
    assert errors
    assert (tmp_path / "copy").stat().st_size < len(LARGE)


def test_passwords_in_a_url_are_used_and_not_shown(
    faulty: FaultyServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_with(faulty.url, "me:hunter2", "sig=s3cret")
    place = open_place(url)
    assert place.read("large", len(LARGE)) == LARGE
    messages = [place.url, shown(url)]

    def fails(*arguments: object, **options: object) -> None:
        raise ValueError(f"not this one: {url}")

    with monkeypatch.context() as patch:
        patch.setattr(place._files, "open", fails)  # type: ignore[attr-defined]
        with pytest.raises(Unreachable, match="not this one: http") as caught:
            place.read("large", 9)
        messages.append(str(caught.value))
    faulty.status = 403
    dead = url_with(f"http://127.0.0.1:{free_port()}", "me:hunter2", "sig=s3cret")
    for each in (place, open_place(dead)):
        with pytest.raises(SnapshotError) as failed:
            each.read("large", len(LARGE))
        messages.append(str(failed.value))
    with pytest.raises(ConfigError) as refused:
        open_place("ftp://me:hunter2@host/x?sig=s3cret")
    text = "".join([*messages, str(refused.value), caplog.text])
    assert "hunter2" not in text
    assert "s3cret" not in text
