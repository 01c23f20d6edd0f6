"""A run whose ranks all read and join, against a run of one process over the same log."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.fronts import run_front
from support.joins import capacity
from support.thread_ranks import on_threads
from support.trainers import (
    SIMULATED_FIELDS,
    Partitions,
    assert_equal_states,
    final_state,
    finish,
    split,
    trainer,
)

from stream_ctr.connectors import Records
from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.errors import BrokerError, ConfigError, DataError
from stream_ctr.events.batch import Arrivals, EventBatch, Rejected
from stream_ctr.events.field import Field
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.shared_joiner import SharedJoiner
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Input
from stream_ctr.train.front import Front
from stream_ctr.train.front_lead import LeadWatermarks, faces
from stream_ctr.train.ingest import Ingest, Poll
from stream_ctr.train.inputs import Inputs

Values = Sequence[pa.LargeBinaryArray]
# What a report says of the log and the models, and not of the machine.
SAME = (
    *("kind", "examples", "events", "event_time", "watermark", "pending", "counters"),
    *("clicks_late", "click_coverage", "ledger", "models", "stalls", "window_curve", "fields"),
)


@pytest.fixture(scope="module")
def stream() -> pa.LargeBinaryArray:
    return pa.concat_arrays([batch.value for batch in Simulation(2500, seed=3).batches()])


def alone(directory: Path, values: Values, **arguments: Any) -> dict[str, Any]:
    return finish(trainer(directory, Partitions(values), **arguments))


def reading(values: Values, *, seed: int = 0, **options: Any) -> Callable[[int], Partitions]:
    return lambda rank: Partitions(values, seed=seed + rank, **options)


def assert_equal_reports(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name in SAME:
        assert found[name] == wanted[name], name


def newest(directory: Path) -> Any:
    path = snapshot.newest(directory / "snapshots")
    assert path
    return snapshot.read_manifest(path)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "read_ahead"), [(2, 500), (6, 0)])
def test_any_number_of_ranks_learns_the_model_of_one_process(
    tmp_path: Path, stream: pa.LargeBinaryArray, size: int, read_ahead: int
) -> None:
    """Six ranks read four partitions, so two of them only join."""
    values = split(stream, 4)
    wanted = alone(tmp_path / "alone", values)
    sections: dict[str, Any] = {"input": {"read_ahead": read_ahead}}
    found = run_front(size, tmp_path / "ranks", reading(values), **sections)
    assert_equal_states(tmp_path / "alone", tmp_path / "ranks")
    assert_equal_reports(found, wanted)
    before, after = newest(tmp_path / "alone"), newest(tmp_path / "ranks")
    assert (after.positions, after.ledger) == (before.positions, before.ledger)
    assert set(found["profile"]["reader"]) >= {"decode", "hash", "poll"}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_each_time(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    """One process, then two ranks, four, and one again; each stops within the log."""
    values = split(stream, 4)
    short: dict[str, Any] = {"join": {"label_window": "10s", "allowed_lateness": "5s"}}
    alone(tmp_path / "alone", values, **short)
    directory = tmp_path / "ranks"
    finish(trainer(directory, Partitions(values, stop_after=700, largest=100), **short))
    for size in (2, 4):
        before = newest(directory)
        stopping = reading(values, stop_after=150, largest=60)
        assert run_front(size, directory, stopping, **short)["kind"] == "stopped"
        after = newest(directory)
        assert after.examples > before.examples
        for name, position in before.positions.items():
            assert position < after.positions[name] < len(values[int(name[-1])])
    last = trainer(directory, Partitions(values), **short)
    resumed = snapshot.newest(directory / "snapshots")
    assert resumed
    last.restore(resumed)
    finish(last)
    assert_equal_states(tmp_path / "alone", directory)


@pytest.mark.slow
def test_ranks_that_spill_learn_the_same_and_resume_with_another_number(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    values = split(stream, 3)
    long: dict[str, Any] = {"join": {"label_window": "30m"}}
    alone(tmp_path / "alone", values, **long)
    directory = tmp_path / "ranks"
    with capacity(index=1 << 14, pending=1 << 13, clicks=1 << 12, features=100):
        stopping = reading(values, stop_after=500, largest=100)
        report = run_front(2, directory, stopping, **long)
        assert report["counters"]["impressions_spilled"] > 0
        segments = [name for name in newest(directory).files if name.startswith("segment-")]
        numbers = {int(name.removeprefix("segment-").partition(".")[0]) % 2 for name in segments}
        assert numbers == {0, 1}  # of either rank
        run_front(3, directory, reading(values, stop_after=100, largest=60), **long)
        run_front(2, directory, reading(values), **long)
    one, other = final_state(tmp_path / "alone"), final_state(directory)
    for name, array in one["model"].items():
        assert np.array_equal(other["model"][name], array), name
    assert newest(directory).ledger == newest(tmp_path / "alone").ledger


@pytest.mark.slow
def test_topics_that_follow_a_log_are_read_by_all_ranks(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    """A rank that begins the topics sooner than the others waits for them with its first poll."""
    day1, rest = stream.slice(0, 1000), stream.slice(1000)
    ended = [Input(kind="log", partitions=("clicks:0",), ended=True)]

    class Topic(Partitions):
        def topic_ids(self) -> dict[str, str | None]:
            return {"topic": None}

    def topic(rank: int = 0) -> Topic:
        source = Topic(split(rest, 3), seed=rank)
        source.partitions = tuple(("topic", index) for index in range(3))
        return source

    def following(source: Topic) -> Inputs:
        return Inputs([source], ended=ended, positions={"clicks:0": len(day1)})

    for name in ("alone", "ranks"):
        first = trainer(tmp_path / name, Partitions([day1]), keep_open=True)
        finish(first)
    source = topic()
    built = trainer(tmp_path / "alone", following(source))
    at = snapshot.newest(tmp_path / "alone" / "snapshots")
    assert at
    built.restore(at)
    finish(built)
    sections: dict[str, Any] = {"input": {"read_ahead": 300}}
    run_front(3, tmp_path / "ranks", topic, inputs_of=following, **sections)
    assert_equal_states(tmp_path / "alone", tmp_path / "ranks")
    assert newest(tmp_path / "ranks").positions == newest(tmp_path / "alone").positions


@pytest.mark.slow
def test_rejects_of_every_rank_are_counted_and_kept_and_unlikely_fields_named(
    tmp_path: Path, stream: pa.LargeBinaryArray, caplog: pytest.LogCaptureFixture
) -> None:
    plain = stream.to_pylist()
    for at in range(0, len(plain), 40):
        plain[at] = b"{broken %d" % at
    plain[41] = None  # a tombstone
    values = split(pa.array(plain, pa.large_binary()), 4)
    misspelt = (*SIMULATED_FIELDS, Field(SIMULATED_FIELDS[0].name + "x", "categorical"))
    letters = []
    warnings = []
    reports = []
    for name in ("alone", "ranks"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "stream_ctr.train"):
            directory = tmp_path / name
            if name == "alone":
                reports.append(alone(directory, values, fields=misspelt))
            else:
                reports.append(run_front(3, directory, reading(values), fields=misspelt))
        lines = (directory / "dead_letters.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        letters.append(sorted((each["partition"], each["offset"]) for each in kept))
        warnings.append({record.getMessage() for record in caplog.records if "field" in record.msg})
    assert letters[0] == letters[1]
    assert len(letters[0]) == len(range(0, len(plain), 40))
    assert reports[0]["counters"] == reports[1]["counters"]
    assert any("always missing" in warning for warning in warnings[1])
    assert {warning.partition(":")[2] for warning in warnings[0]} == {
        warning.partition(":")[2] for warning in warnings[1]
    }
    assert_equal_states(tmp_path / "alone", tmp_path / "ranks")


@pytest.mark.slow
def test_a_run_that_reads_mostly_bad_records_on_another_rank_is_stopped(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    good, bad = split(stream, 2)
    broken = pa.array([b"{"] * len(bad), pa.large_binary())
    with pytest.raises(DataError, match=r"records read are bad, more than input.max_bad_share"):
        run_front(2, tmp_path / "state", reading([good, broken]), input={"max_bad_share": 0.1})


class Failing(Partitions):
    """A log whose second poll fails with an error."""

    error: Exception = BrokerError("the broker is gone")

    def poll(self, timeout_seconds: float) -> Records:
        if self.positions()[1]:
            raise self.error
        return super().poll(timeout_seconds)


@pytest.mark.slow
def test_an_error_of_the_source_of_a_rank_ends_the_run_with_that_error(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    values = split(stream, 2)
    with pytest.raises(BrokerError, match=r"^rank 1: the broker is gone$"):
        run_front(2, tmp_path / "state", lambda _: Failing(values), input={"read_ahead": 500})


def test_a_rank_whose_share_of_the_memory_is_too_small_names_the_key(tmp_path: Path) -> None:
    values = [pa.array([], pa.large_binary())] * 2
    with pytest.raises(ConfigError, match=r"join.max_memory = '1MiB' for 2 ranks: at least 1 MiB"):
        run_front(2, tmp_path / "state", reading(values), join={"max_memory": "1MiB"})


# -- rounds --------------------------------------------------------------------------------------


class Live(Partitions):
    """A log that goes on."""

    until_end = False

    @property
    def finished(self) -> bool:
        return False


def front_of(ranks: Ranks, ingest: Any) -> Front:
    """Return a front whose joiners have no events to join."""
    inputs = ingest.source
    marks = LeadWatermarks(partitions=len(inputs.partitions), lateness_ms=0)
    joiner = SharedJoiner(
        ranks,
        LabelJoiner(fields=1, label_window_ms=10),
        marks,
        partitions=inputs.last,
        columns=1,
        value_fields=0,
        id_bits=31,
    )
    return Front(ranks, ingest, joiner)


def test_a_partition_is_idle_when_the_rank_that_reads_it_has_long_heard_nothing() -> None:
    """Rank 1 polls five times as seldom by its clock, so its partitions are silent for longer."""
    nothing = pa.array([], pa.large_binary())

    def work(ranks: Ranks) -> list[list[bool]]:
        inputs = Inputs([Live([nothing] * 4)])
        inputs.divide(ranks.rank, ranks.size)
        ticks = itertools.count()
        seconds = 0.5 if ranks.rank else 0.1
        ingest = Ingest(
            inputs,
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            idle_seconds=30.0,
            clock=lambda: next(ticks) * seconds,
        )
        front = front_of(ranks, ingest)
        front.status()
        return [front.take(0.0).status.idle.tolist() for _ in range(80)]

    first, _ = on_threads(2, work)
    assert first[20] == [False] * 4
    assert first[-1] == [False, True, False, True]


class Polls:
    """A reader that has a poll where `filled` says so, and keeps what it was asked."""

    def __init__(self, filled: Sequence[bool]) -> None:
        self.source = Inputs([Live([pa.array([], pa.large_binary())])])
        self.waits: list[float] = []
        self._filled = iter(filled)
        ingest = Ingest(self.source, None, None)  # type: ignore[arg-type]
        self.status = ingest.status
        self.timer = ingest.timer

    def take(self, timeout_seconds: float) -> Poll:
        self.waits.append(timeout_seconds)
        events = None
        if next(self._filled):
            events = EventBatch(
                records=1,
                impressions=Arrivals.of([], []),
                ids=np.empty((0, 1), np.int32),
                values=np.empty((0, 0), np.float32),
                true_probability=np.empty(0),
                clicks=Arrivals.of([7], [1000]),
                arrival=np.array([0]),
                rejected=Rejected(np.empty(0, np.int32), np.empty(0, np.int64), [], [], [], []),
                with_fields=frozenset(),
                with_unknown_fields=0,
                bad_shares=None,
            )
        return Poll(events, self.status())


def test_ranks_wait_for_records_only_after_a_round_without_any() -> None:
    reader = Polls([True, True, *[False] * 6, True, False])
    team = Team(Ranks.alone(), {"front": lambda ranks: front_of(ranks, reader)})
    ingest, joiner, watermarks = faces(team, *team.make("front"))
    ingest.status()
    for _ in range(10):
        if events := ingest.take(0.25).events:
            assert (events.records, events.events, events.shown) == (1, 1, 0)
            joiner.push(events, watermarks)
    assert reader.waits == [0, 0, 0, 0.005, 0.01, 0.02, 0.04, 0.05, 0.05, 0]
    assert joiner.counts()["clicks"] == 3
    assert watermarks.mark.tolist() == [1000]


def test_nothing_is_asked_of_the_ranks_while_the_watermark_stays() -> None:
    reader = Polls([True])
    team = Team(Ranks.alone(), {"front": lambda ranks: front_of(ranks, reader)})
    _, joiner, _ = faces(team, *team.make("front"))
    asked: list[str] = []
    team.announce = lambda number, method, **_: asked.append(method)  # type: ignore[method-assign]
    for watermark in (5, 5, 3, 6):
        assert len(joiner.advance(watermark)) == 0
    assert asked == ["release", "release"]
    assert joiner.watermark == 6
