"""Ingest and reading ahead: the same polls in the same order, and no thread left over."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.patience import PATIENCE_SECONDS as WAIT
from support.trainers import RIVER, Partitions, assert_equal_states, finish, split, trainer

from stream_ctr.connectors import Records
from stream_ctr.connectors.errors import PositionLost
from stream_ctr.events.arrow_events import pack
from stream_ctr.events.decoder import Clicks, Decoder, Events, Impressions, Rejections
from stream_ctr.events.features import Hasher, hash_ids
from stream_ctr.events.field import Field
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest
from stream_ctr.train import stage_timer
from stream_ctr.train.ingest import Ingest, Poll, Silence, SourceStatus
from stream_ctr.train.read_ahead import ReadAhead

FIELDS = [Field("app", "categorical")]


def impression(number: int) -> bytes:
    return b'{"kind":"impression","impression_id":"i%d","time":%d,"features":{"app":"a"}}' % (
        number,
        1735689600000 + number,
    )


def click(number: int) -> bytes:
    return b'{"kind":"click","impression_id":"i%d","time":%d}' % (number, 1735689600000 + number)


class Polls:
    """A source whose polls return given records of partition 0, or raise.

    `asked` counts the polls, `by` holds the threads that polled.
    """

    partitions = (("clicks", 0),)
    until_end = True

    def __init__(self, *polls: Sequence[bytes | None] | BaseException) -> None:
        self._polls = polls
        self.asked = self._read = 0
        self.by: set[str] = set()
        self.paused: list[frozenset[int]] = []
        self.commits = 0

    @property
    def finished(self) -> bool:
        return self.asked >= len(self._polls)

    def caught_up(self) -> np.ndarray:
        return np.array([self.finished])

    def poll(self, timeout_seconds: float) -> Records:
        self.by.add(threading.current_thread().name)
        brought = self._polls[self.asked]
        if isinstance(brought, BaseException):
            raise brought
        self.asked += 1
        offset = np.arange(self._read, self._read + len(brought))
        self._read += len(brought)
        return Records(
            np.zeros(len(brought), np.int32),
            offset,
            np.full(len(brought), -1),
            pa.array(brought, pa.large_binary()),
        )

    def positions(self) -> dict[int, int]:
        return {0: self._read}

    def pause(self, partitions: frozenset[int]) -> None:
        self.by.add(threading.current_thread().name)
        self.paused.append(partitions)

    def lag(self) -> int:
        return 0

    def silent_seconds(self) -> float:
        return 0.0

    def lost(self) -> dict[int, int]:
        return {0: 0}

    def leader_epochs(self) -> dict[int, int]:
        return {}

    def topic_ids(self) -> dict[str, str | None]:
        return {}

    def seek(self, positions: Any) -> None:
        raise AssertionError("nobody seeks here")

    def commit(self, positions: Any) -> None:
        self.commits += 1


class Topic(Polls):
    """One that goes on: after its polls there is nothing more, however often it is asked."""

    until_end = False
    finished = False

    def poll(self, timeout_seconds: float) -> Records:
        if self.asked < len(self._polls):
            return super().poll(timeout_seconds)
        time.sleep(0.001)
        return Records.empty()

    def caught_up(self) -> np.ndarray:
        return np.array([self.asked >= len(self._polls)])


def ingest(source: Any, **options: Any) -> Ingest:
    return Ingest(source, Decoder(FIELDS), Hasher(FIELDS, table_bits=10), **options)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.001)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not readers()


def everything(taking: Ingest | ReadAhead) -> list[Poll]:
    """All that is poll until the source has ended, without what brought nothing."""
    poll = [taking.take(WAIT)]
    while not poll[-1].status.finished:
        poll.append(taking.take(WAIT))
    return [one for one in poll if one.events]


# -- what is poll --------------------------------------------------------------------------------


def test_impressions_and_clicks_are_put_in_order_of_arrival_and_rejects_keep_their_bytes():
    poll = ingest(Polls([click(7), impression(1), b"junk", impression(2), click(2), None])).take(0)
    columns = poll.events
    assert columns
    assert (columns.records, columns.events, len(columns.impressions), len(columns.clicks)) == (
        6,
        6,
        2,
        2,
    )
    came = np.concatenate([columns.impressions.id_hash, columns.clicks.id_hash])[columns.arrival]
    assert came.tolist() == hash_ids(pa.array(["i7", "i1", "i2", "i2"])).tolist()
    assert (columns.impressions.place.tolist(), columns.clicks.place.tolist()) == (
        [1 << 20, 3 << 20],
        [0, 4 << 20],
    )
    rejected = columns.rejected
    assert (rejected.offset.tolist(), rejected.value, rejected.reason) == (
        [2, 5],
        [b"junk", None],
        ["not_json", "tombstone"],
    )
    assert columns.with_fields == {"app"}
    assert poll.status.positions == {0: 6}


def test_events_of_one_record_keep_their_order_and_come_before_those_of_the_next():
    class Batches(Decoder):
        """A record holds three events: two impressions with a click between them."""

        def decode(self, values, received=None):
            row = np.arange(len(values))
            ids, times = pa.array(["i"] * 2 * len(values)), np.full(2 * len(values), 1735689600000)
            features, unknown = (
                {"app": pa.array(["a"] * 2 * len(values))},
                np.full(2 * len(values), np.nan),
            )
            impressions = Impressions(
                row.repeat(2), np.tile([0, 2], len(values)), ids, times, features, unknown
            )
            clicks = Clicks(
                row, np.full(len(values), 1), ids.slice(0, len(values)), times[: len(values)]
            )
            nothing = np.empty(0, np.int64)
            examples = Impressions(
                nothing, nothing, ids[:0], nothing, {"app": ids[:0]}, np.empty(0)
            )
            events = Events(impressions, clicks, examples, np.empty(0, np.uint8))
            return events, Rejections(nothing, nothing, [], [], [])

    columns = (
        Ingest(Polls([b"", b""]), Batches(FIELDS), Hasher(FIELDS, table_bits=10)).take(0).events
    )
    assert columns
    place = np.concatenate([columns.impressions.place, columns.clicks.place])
    assert place[columns.arrival].tolist() == [0, 1, 2, 1 << 20, (1 << 20) + 1, (1 << 20) + 2]


def test_a_partition_is_idle_when_it_could_have_spoken_and_did_not():
    silence, nobody = Silence(2, now=0.0), np.array([], np.int32)
    assert silence.after_poll(np.array([0, 0]), now=0.5).tolist() == [0.0, 0.5]
    assert silence.after_poll(nobody, now=1.5).tolist() == [1.0, 1.5]
    assert silence.after_poll(nobody, now=60.0, brokers_silent=True).tolist() == [
        1.0,
        1.5,
    ]  # nobody could have
    assert silence.after_poll(nobody, now=100.0).tolist() == [
        2.0,
        2.5,
    ]  # nobody polled: only a second of it counts
    assert silence.after_poll(np.array([1]), now=100.5).tolist() == [2.5, 0.0]


def test_a_reader_that_waits_for_room_makes_no_partition_idle():
    now = [0.0]
    source = Topic([impression(1)], [impression(2)])
    reading = Ingest(
        source,
        Decoder(FIELDS),
        Hasher(FIELDS, table_bits=10),
        idle_seconds=30.0,
        clock=lambda: now[0],
    )
    with ReadAhead(reading, most_records=1) as ahead:
        ahead.take(WAIT)
        until(lambda: ahead._ready)  # full
        now[0] = 1000.0
        poll = [ahead.take(WAIT)]
        until(lambda: (poll.append(ahead.take(WAIT)), source.caught_up()[0])[1])
        assert not any(one.status.idle.any() for one in poll)


# -- reading ahead -------------------------------------------------------------------------------


def told(poll: Poll) -> tuple[object, ...]:
    columns, status = poll.events, poll.status
    assert columns
    arrays = (
        columns.ids,
        columns.impressions.place,
        columns.clicks.id_hash,
        columns.arrival,
        columns.rejected.offset,
        status.caught_up,
    )
    return (
        columns.records,
        status.positions,
        status.finished,
        *(array.tolist() for array in arrays),
    )


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=20),
    most_records=st.integers(1, 30),
    most_bytes=st.integers(1, 2000),
)
@settings(max_examples=50, deadline=None)
def test_what_is_read_ahead_is_what_is_read_when_asked(sizes, most_records, most_bytes):
    numbers = iter(range(1000))
    polls = [
        [
            click(n) if n % 3 else impression(n) if n % 2 else b"junk"
            for n in (next(numbers) for _ in range(size))
        ]
        for size in sizes
    ]
    asked = everything(ingest(Polls(*polls)))
    with ReadAhead(
        ingest(Polls(*polls)), most_records=most_records, most_bytes=most_bytes
    ) as ahead:
        assert list(map(told, everything(ahead))) == list(map(told, asked))


@pytest.mark.parametrize(
    ("bound", "polls_ahead"),
    [
        ({"most_records": 25}, 3),
        ({"most_records": 1}, 1),
        ({"most_records": 10**9, "most_bytes": 1}, 1),
    ],
)
def test_the_reader_is_ahead_by_one_poll_over_the_bound_and_no_more(bound, polls_ahead):
    source = Polls(*[[impression(n) for n in range(10)]] * 50)
    with ReadAhead(ingest(source), **bound) as ahead:
        for poll in range(1, 10):
            ahead.take(WAIT)
            until(lambda poll=poll: source.asked == poll + polls_ahead)
            time.sleep(0.005)
            assert source.asked == poll + polls_ahead


def test_polls_that_bring_nothing_are_not_piled_up():
    source = Topic([impression(1)])
    with ReadAhead(ingest(source), most_records=10) as ahead:
        ahead.take(WAIT)
        until(lambda: ahead._ready)
        time.sleep(0.05)
        assert len(ahead._ready) == 1


def test_positions_are_those_after_what_was_taken_whatever_was_read_since():
    source = Polls(*[[impression(n) for n in range(10)]] * 20)
    with ReadAhead(ingest(source), most_records=100) as ahead:
        for poll in range(1, 21):
            assert ahead.take(WAIT).status.positions == {0: 10 * poll}
            until(lambda poll=poll: source.positions()[0] >= min(10 * poll + 100, 200))


def test_when_nothing_comes_in_time_the_source_stands_as_before():
    held = threading.Event()

    class Held(Topic):
        def poll(self, timeout_seconds: float) -> Records:
            if self.asked == 1:
                assert held.wait(WAIT)
            return super().poll(timeout_seconds)

    with ReadAhead(ingest(Held([impression(1)], [impression(2)])), most_records=10) as ahead:
        first = ahead.take(WAIT)
        late = ahead.take(0.01)
        held.set()
        assert late == Poll(None, first.status)
        assert ahead.take(WAIT).events


@pytest.mark.parametrize(
    "error", [PositionLost("gone"), MemoryError("full"), ZeroDivisionError("a bug")]
)
def test_an_error_comes_after_what_was_read_before_it_with_the_traceback_it_had(error):
    with ReadAhead(
        ingest(Polls([impression(1)], [impression(2)], error)), most_records=100
    ) as ahead:
        until(lambda: ahead.take(0.0).events)
        until(lambda: ahead._ended)  # it has happened, and it waits for its turn
        assert ahead.take(WAIT).events
        for _ in range(2):
            with pytest.raises(type(error)) as raised:
                ahead.take(WAIT)
        assert raised.value is error
        assert "in poll" in "".join(traceback.format_tb(raised.tb))


def test_an_error_of_decoding_is_raised_where_it_is_taken():
    class Broken(Decoder):
        def decode(self, values, received=None):
            if len(values) == 2:
                raise AssertionError("a bug in decoding")
            return super().decode(values, received)

    reading = Ingest(
        Polls([impression(1)], [impression(2), click(2)]),
        Broken(FIELDS),
        Hasher(FIELDS, table_bits=10),
    )
    with ReadAhead(reading, most_records=100) as ahead:
        assert ahead.take(WAIT).events
        with pytest.raises(AssertionError, match="a bug in decoding"):
            ahead.take(WAIT)


def test_only_the_reader_touches_the_source_once_it_reads_and_pausing_reaches_it():
    source = Topic(*[[impression(n)] for n in range(50)])
    with ReadAhead(ingest(source), most_records=1) as ahead:
        ahead.take(WAIT)
        until(lambda: ahead._ready)
        ahead.pause(frozenset({0}))
        ahead.pause(frozenset())
        ahead.pause(frozenset({0}))
        asked = source.asked
        assert not source.paused, "it waits for room"
        ahead.take(WAIT)
        until(lambda: source.paused)
        assert source.paused == [frozenset({0})], "of several the last"
        assert source.asked <= asked + 1
        until(lambda: (ahead.take(WAIT), source.asked > asked + 5)[1])
        assert source.paused == [frozenset({0})], "once"
    assert source.by == {"reader"}


@pytest.mark.parametrize("busy", ["full", "in a poll", "ended", "failed", "not begun"])
def test_closing_ends_the_thread_whatever_it_is_doing(busy):
    polls = {
        "full": [[impression(1)]] * 9,
        "ended": [[impression(1)]],
        "failed": [KeyError("x")],
    }.get(busy)
    source = Polls(*polls) if polls else Topic()
    ahead = ReadAhead(ingest(source), most_records=1)
    if busy not in ("not begun", "failed"):
        ahead.take(WAIT)
    elif busy == "failed":
        with pytest.raises(KeyError):
            ahead.take(WAIT)
    began = time.monotonic()
    ahead.close()
    ahead.close()
    assert time.monotonic() - began < WAIT
    assert not readers()


# -- beneath the trainer -------------------------------------------------------------------------

AHEAD = {"input": {"read_ahead": 700}, **RIVER}


@pytest.fixture(scope="module")
def stream() -> pa.LargeBinaryArray:
    return pa.concat_arrays([batch.value for batch in Simulation(3000, seed=3).batches()])


def sections(read_ahead: int) -> dict[str, Any]:
    return {
        "input": {"read_ahead": read_ahead},
        "baseline": {"enabled": False},
        "schedule": {"snapshot_examples": 512},
        "snapshots": {"keep": 99},
    }


class Killed(Exception):
    """Stands for the end of the process."""


def learn_until(built: Any, batches: int, end: Callable[[], object]) -> None:
    """In place of the batch after so many, `end`."""
    learn, left = built.state.learners["deepfm"].learn, [batches]

    def learn_or_end(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            end()
        return learn(*arguments, **options)

    built.state.learners["deepfm"].learn = learn_or_end


def killed() -> None:
    raise Killed


def snapshots(directory: Path) -> list[tuple[Manifest, dict[str, dict[str, np.ndarray]]]]:
    return [
        snapshot.load(directory / "snapshots" / name)
        for name in snapshot.snapshot_ids(directory / "snapshots")
    ]


def assert_same_snapshots(
    one: Path, other: Path, *, stems: Sequence[str], of_manifest: Sequence[str]
) -> None:
    ours, theirs = snapshots(one), snapshots(other)
    assert len(ours) == len(theirs) > 1
    for (manifest, tensors), (other_manifest, other_tensors) in zip(ours, theirs, strict=True):
        assert [getattr(manifest, name) for name in of_manifest] == [
            getattr(other_manifest, name) for name in of_manifest
        ]
        for stem in stems:
            assert tensors[stem].keys() == other_tensors[stem].keys()
            for name, array in tensors[stem].items():
                assert np.array_equal(array, other_tensors[stem][name]), f"{stem} {name}"


@given(seed=st.integers(0, 99), read_ahead=st.integers(1, 5000), kill=st.integers(0, 22))
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.slow
def test_every_snapshot_of_a_run_that_reads_ahead_and_is_killed_is_that_of_one_that_does_neither(
    stream, seed, read_ahead, kill
):
    """With one partition, polls and positions are the same at every snapshot before the kill."""
    directory = Path(tempfile.mkdtemp())
    try:
        finish(trainer(directory / "asked", Partitions([stream], seed=seed), **sections(0)))
        source = Partitions([stream], seed=seed)
        whole = trainer(directory / "ahead", source, **sections(read_ahead))
        finish(whole)
        everything = ("model", "optimizer", "ftrl.model", "metrics", "joiner", "examples")
        assert_same_snapshots(
            directory / "asked",
            directory / "ahead",
            stems=everything,
            of_manifest=("positions", "ledger", "counters", "examples"),
        )
        dying = trainer(
            directory / "dying", Partitions([stream], seed=seed), **sections(read_ahead)
        )
        learn_until(dying, kill, killed)
        with pytest.raises(Killed):
            finish(dying)
        assert not readers()
        resumed = trainer(
            directory / "dying", Partitions([stream], seed=seed + 1), **sections(read_ahead)
        )
        if newest := snapshot.newest(directory / "dying" / "snapshots"):
            resumed.restore(newest)
        finish(resumed)
        for stem in ("model", "optimizer", "ftrl.model", "metrics", "joiner"):
            ours, theirs = (
                snapshots(directory / "dying")[-1][1][stem],
                snapshots(directory / "asked")[-1][1][stem],
            )
            assert all(np.array_equal(array, theirs[name]) for name, array in ours.items()), stem
    finally:
        shutil.rmtree(directory)


@given(seed=st.integers(0, 99), read_ahead=st.integers(1, 5000))
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.slow
def test_of_partitions_that_are_paused_meanwhile_the_same_is_learned(stream, seed, read_ahead):
    directory = Path(tempfile.mkdtemp())
    short = {
        "join": {"label_window": "5s", "allowed_lateness": "1s"}
    }  # then partitions are ahead of others
    try:
        finish(
            trainer(
                directory / "asked", Partitions(split(stream, 3), seed=seed), **sections(0), **short
            )
        )
        source = Partitions(split(stream, 3), seed=seed + 1)
        finish(trainer(directory / "ahead", source, **sections(read_ahead), **short))
        assert_same_snapshots(
            directory / "asked",
            directory / "ahead",
            stems=("model", "optimizer", "ftrl.model", "metrics"),
            of_manifest=("ledger", "examples"),
        )
    finally:
        shutil.rmtree(directory)


def test_a_snapshot_is_never_past_what_was_joined(tmp_path, stream):
    """The fake polls whenever there is room, so hundreds of records are ahead at each snapshot."""
    ahead = []

    class Watched(Partitions):
        def commit(self, positions: Mapping[int, int]) -> None:
            ahead.append(sum(self.positions().values()) - sum(positions.values()))

    source = Watched(split(stream, 2), seed=5)
    finish(trainer(tmp_path, source, **sections(1500)))
    for manifest, _ in snapshots(tmp_path):
        assert sum(manifest.positions.values()) == manifest.counters["records"]
    assert max(ahead) > 0, "the reader was ahead"
    assert ahead[-1] == 0


@pytest.mark.slow
def test_a_run_told_to_stop_leaves_what_it_has_not_taken_to_the_next_one(tmp_path, stream):
    finish(trainer(tmp_path / "whole", Partitions([stream], seed=1), **AHEAD))
    stopped = trainer(tmp_path / "parts", Partitions([stream], seed=1), **AHEAD)
    learn_until(stopped, 5, stopped.stop)
    report = finish(stopped)
    assert (report["kind"], report["examples"]) == ("stopped", 6 * 128)
    assert not readers()
    resumed = trainer(tmp_path / "parts", Partitions([stream], seed=2), **AHEAD)
    resumed.restore(snapshot.newest(tmp_path / "parts" / "snapshots"))
    finish(resumed)
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")


def test_an_error_of_the_source_ends_the_run_when_all_before_it_is_joined(tmp_path, stream):
    class Failing(Partitions):
        def poll(self, timeout_seconds: float) -> Records:
            if self._at[0] > 2000:
                raise PositionLost("retention was faster")
            return super().poll(timeout_seconds)

    source = Failing([stream], seed=1)
    built = trainer(tmp_path, source, **sections(10_000))
    with pytest.raises(PositionLost, match="retention was faster"):
        finish(built)
    assert built.state.counters["records"] == source.positions()[0] > 2000


def test_a_record_of_many_events_is_bad_by_the_share_of_its_bad_events():
    lines = [impression(1), click(1), impression(2).replace(b"i2", b""), impression(3)]
    good, part = (
        pack(pa.array(lines[:2], pa.large_binary()), events_a_record=2),
        pack(pa.array(lines, pa.large_binary()), events_a_record=4),
    )
    columns = (
        ingest(
            Polls(
                [
                    *good.to_pylist(),
                    *part.to_pylist(),
                    b"junk",
                    None,
                    b"\xff\xff\xff\xff",
                    impression(4),
                ]
            )
        )
        .take(0)
        .events
    )
    assert columns.records == 6
    assert columns.bad_shares is not None
    assert columns.bad_shares.tolist() == [0, 0.25, 1, 0, 1, 0]
    assert columns.rejected.event == [2, None, None, None]


@given(
    st.lists(st.tuples(st.integers(-400, 400), st.integers(-400, 400)), min_size=1, max_size=20),
    st.lists(st.floats(400, 1e7), min_size=2, max_size=2),
)
def test_the_clock_decides_nothing_about_records_that_are_not_ahead_of_it(
    seconds: list[tuple[int, int]], clocks: list[float]
) -> None:
    start = 1_735_689_600
    value = [
        b'{"kind":"click","impression_id":"a","time":%d}' % (start + event) for event, _ in seconds
    ]
    records = Records(
        np.zeros(len(value), np.int32),
        np.arange(len(value)),
        np.array([(start + record) * 1000 for _, record in seconds]),
        pa.array(value, pa.large_binary()),
    )
    verdicts = []
    for clock in clocks:
        reader = ingest(Polls(), wall_clock=lambda clock=clock: start + clock)
        events = reader.events(records)
        verdicts.append((events.rejected.offset.tolist(), events.rejected.reason))
    late = [n for n, (event, record) in enumerate(seconds) if event > record + 300]
    assert verdicts == [(late, ["time_in_future"] * len(late))] * 2


# -- the profile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("read_ahead", [0, 700])
def test_a_report_tells_where_the_time_went_and_the_stages_of_a_thread_add_up(
    tmp_path, stream, read_ahead
):
    built = trainer(tmp_path, Partitions([stream]), **sections(read_ahead))
    ticks: list[int] = []

    def clock() -> int:
        """Return a time one millisecond later than that of the last call."""
        ticks.append(len(ticks))
        return 10**6 * len(ticks)

    # The trainer's parts hold this timer, so a new one would not reach them.
    vars(built.timer).update(vars(stage_timer.StageTimer(clock=clock)))
    told = built.publisher.report
    at_report: list[int] = []
    built.publisher.report = lambda report: at_report.append(len(ticks)) or told(report)
    known = finish(built)["profile"]
    assert {"poll", "decode", "hash"} <= known["reader"].keys()
    assert ("wait.trainer" in known["reader"]) == bool(read_ahead)
    assert {"join", "learn", "score", "snapshot", "wait.reader"} <= known["trainer"].keys()
    began = (
        2  # the clock was looked at when the stages were made, and when the first one was entered
    )
    assert sum(stage["seconds"] for stage in known["trainer"].values()) == pytest.approx(
        (at_report[-1] - began) / 1000
    )
    for stage in known["trainer"].values():
        assert stage["ns_per_event"] == pytest.approx(
            1e9 * stage["seconds"] / len(stream), abs=1e9 * 0.0006 / len(stream)
        )


@pytest.mark.parametrize(
    ("reader", "trainer_", "bound", "words"),
    [
        (
            {"poll": 1, "wait.trainer": 9},
            {"learn": 8, "wait.reader": 1, "wait.baseline": 1},
            "learning",
            "for the baseline 10%",
        ),
        (
            {"poll": 5, "decode": 4, "wait.source": 1, "wait.trainer": 0},
            {"learn": 2, "wait.reader": 8},
            "ingest",
            "waits for the reader 80%",
        ),
        (
            {"poll": 1, "wait.source": 9},
            {"learn": 2, "wait.reader": 8},
            "source",
            "mostly for records",
        ),
        (
            {"poll": 6, "decode": 4},
            {"learn": 6, "wait.reader": 4},
            "ingest",
            "ingest and learning take turns",
        ),
        (
            {"poll": 1, "wait.trainer": 9},
            {"learn": 2, "wait.baseline": 8},
            "baseline",
            "a lower baseline.sample_rate",
        ),
        (
            {"poll": 1, "wait.trainer": 9},
            {"learn": 7, "wait.baseline": 3},
            "baseline",
            "waits for it 30%",
        ),
    ],
)
def test_the_bound_is_who_needs_the_most_time(reader, trainer_, bound, words):
    known = stage_timer.profile(
        *(
            {name: seconds * 10**9 for name, seconds in thread.items()}
            for thread in (reader, trainer_)
        ),
        events=10,
    )
    assert known["bound"] == bound
    last = stage_timer.table(known).splitlines()[-1]
    assert words in last
    assert bound in last.lower()


def test_a_stage_that_an_error_leaves_is_left():
    spent = stage_timer.StageTimer(clock=iter(range(0, 100, 10)).__next__)
    with pytest.raises(KeyError), spent("learn"), spent("learn.gather"):
        raise KeyError
    with spent("join"):
        pass
    assert spent.nanoseconds() == {"learn": 20, "learn.gather": 10, "join": 10}


@pytest.mark.slow
def test_learning_that_waits_for_the_baseline_says_so_once_and_what_to_do(
    tmp_path, stream, caplog, monkeypatch
):
    monkeypatch.setattr("stream_ctr.learn.baseline._MAX_WAITING_BYTES", 1)
    with caplog.at_level("WARNING"):
        finish(trainer(tmp_path, Partitions([stream]), **RIVER))
    said = [record.getMessage() for record in caplog.records if "river_ftrl" in record.getMessage()]
    assert len(said) == 1
    assert "learning is no faster than it" in said[0]
    assert "baseline.sample_rate" in said[0]


def test_a_partition_that_is_idle_in_a_topic_that_goes_on_is_only_so_when_it_was_read_to_its_end():
    now = [0.0]
    source = Topic([impression(1)], [])
    reading = Ingest(
        source,
        Decoder(FIELDS),
        Hasher(FIELDS, table_bits=10),
        idle_seconds=0.0,
        clock=lambda: now[0],
    )
    status: list[SourceStatus] = [reading.take(0).status, reading.take(0).status]
    assert [one.idle.tolist() for one in status] == [[False], [True]]
