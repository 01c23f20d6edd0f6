"""Faults of the trainer: wrong clocks, stalls, duplicates, NaN, full disks, damaged files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from msgspec import structs
from support import forks
from support.commands import own_topics
from support.lineage import SMALL, Fingerprint, last_report, newest, published
from support.long import only_long
from support.patience import PATIENCE_SECONDS, catches, started, wait_until
from support.reliability import Outcome
from support.trainers import RIVER, SIMULATED_FIELDS, Partitions, finish, split, trainer

from stream_ctr.cli.main import main
from stream_ctr.connectors import Records, kafka
from stream_ctr.connectors.memory import BatchSource
from stream_ctr.errors import DataError
from stream_ctr.events.fit import Fitted
from stream_ctr.failpoint import VARIABLE
from stream_ctr.join.join_state import MOST_WAITING_OF_AN_ID
from stream_ctr.logs.open import open_log
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer import encode_pointer, pointer_for, read_pointer, write_pointer
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.subscriber import Subscriber
from stream_ctr.train.trainer import Surroundings

ROOT = Path(__file__).parents[1]
IMPRESSIONS = 6000
FREQUENT = {"schedule": {"snapshot_examples": 1024}}


@pytest.fixture(scope="module")
def stream() -> pa.LargeBinaryArray:
    return pa.concat_arrays([batch.value for batch in Simulation(IMPRESSIONS, seed=3).batches()])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    Simulation(4000, seed=5).write_jsonl(path)
    return path


@pytest.fixture(scope="module")
def clean(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("clean") / "state"
    assert run(log, state).exit_code == 0
    return state


def run(log: Path, state: Path, *options: str) -> Any:
    return CliRunner().invoke(
        main, ["run", "--source", str(log), "--state", str(state), *SMALL, *options]
    )


def run_apart(
    log: Path, state: Path, *options: str, failpoint: str = "", **arguments: Any
) -> subprocess.Popen[str]:
    command = ["run", "--source", log, "--state", state, *SMALL, *options]
    environment = {**os.environ, **({VARIABLE: failpoint} if failpoint else {})}
    return started(
        forks.start(*command, env=environment, stderr=subprocess.PIPE, text=True, **arguments)
    )


def read_until(process: subprocess.Popen[str], part: str) -> str:
    """What it says up to the line that has this part."""
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line
        if part in line:
            return said
    raise AssertionError(f"it ended without {part!r}: {said[-3000:]}")


def taken(state: Path) -> Fingerprint:
    found = newest(state)
    assert found
    return found


def documents(stream: pa.LargeBinaryArray) -> list[dict[str, Any]]:
    return [json.loads(value) for value in stream.to_pylist()]


def encoded(events: Sequence[dict[str, Any]]) -> pa.LargeBinaryArray:
    return pa.array([json.dumps(event).encode() for event in events], pa.large_binary())


# -- time ----------------------------------------------------------------------------------------


@pytest.mark.fault(12, injected="every record 1 to 3 times, shuffled within the lateness")
@pytest.mark.fault(13, injected="records shuffled within the lateness")
@pytest.mark.slow
def test_duplicates_and_disorder_within_the_lateness_change_nothing(tmp_path, stream, outcome):
    # Every event at a time of its own: those of one time are ordered by their place in the log.
    events = [
        {**event, "time": event["time"] + number} for number, event in enumerate(documents(stream))
    ]
    rng = np.random.default_rng(0)
    at = np.array([event["time"] for event in events]) + rng.integers(
        0, 25_000, len(events)
    )  # the lateness is 30 s
    disordered = [events[row] for row in np.argsort(at, kind="stable")]
    copies = rng.integers(1, 4, len(events))
    again = at.repeat(copies) + rng.integers(0, 4_000, copies.sum())
    repeated = [
        events[row]
        for row in np.arange(len(events)).repeat(copies)[np.argsort(again, kind="stable")]
    ]
    plain = finish(trainer(tmp_path / "plain", Partitions([encoded(events)])))
    for name, log in (("disordered", disordered), ("repeated", repeated)):
        report = finish(trainer(tmp_path / name, Partitions([encoded(log)])))
        assert report["ledger"] == plain["ledger"]
        assert taken(tmp_path / name).weights_sha256 == taken(tmp_path / "plain").weights_sha256
        counters = report["counters"]
        assert counters["impressions"] - counters["impressions_duplicate"] == IMPRESSIONS
    assert counters["impressions_duplicate"] > IMPRESSIONS / 2
    assert counters["clicks_duplicate"] > 0
    outcome(
        f"ledger and weights equal; {counters['impressions_duplicate']:,} repeated impressions "
        f"counted, none trained twice"
    )


class Live(Partitions):
    """A topic that grows; a clock that moves with the polls."""

    until_end = False
    finished = False
    now = 0.0
    polls = 200

    def poll(self, timeout_seconds: float) -> Records:
        self.now += 1.0
        if self.now >= self.polls and self.trainer:
            self.trainer.stop()
        return super().poll(timeout_seconds)


def live(
    directory: Path,
    source: Live,
    *,
    wall_clock: Callable[[], float] = time.time,
    **sections: Any,
) -> Any:
    return trainer(
        directory,
        source,
        surroundings=Surroundings(clock=lambda: source.now, wall_clock=wall_clock),
        **{"join": {"label_window": "60s", "idle_timeout": "10s"}, **sections},
    )


@pytest.mark.fault(15, injected="4 partitions, one of them silent")
@pytest.mark.fault(16, injected="the silent partition wakes with records an hour old")
@pytest.mark.slow
def test_a_silent_partition_is_excused_and_what_it_brings_later_is_late_and_harms_nobody(
    tmp_path, stream, outcome
):
    *three, waking = split(stream, 4)
    old = [
        {**event, "time": event["time"] - 3_600_000, "impression_id": f"old-{i}"}
        for i, event in enumerate(documents(waking)[:200])
    ]

    class Waking(Live):
        def poll(self, timeout_seconds: float) -> Records:
            if self.now == 150:
                before.append(built.state.joiner.watermark)
                self._values = [*three, encoded(old)]
            return super().poll(timeout_seconds)

    before: list[int] = []
    built = live(tmp_path, Waking([*three, pa.array([], pa.large_binary())]))
    report = finish(built)
    impressions = sum(event["kind"] == "impression" for event in old)
    assert before[0] > 0, "the watermark had advanced without it"
    assert built.state.joiner.watermark >= before[0]
    assert report["counters"]["impressions_late"] == impressions
    others = finish(live(tmp_path / "others", Live(three)))
    assert report["ledger"] == others["ledger"]
    outcome(
        f"the watermark advances after the timeout and never goes back; {impressions} impressions "
        f"late, the others' ledger unchanged"
    )


@pytest.mark.fault(
    17, injected="one record in 20 from clocks that are 2 h ahead, 2 h behind, at 1970, at 2099"
)
@pytest.mark.parametrize("source", ["log", "broker"])
@pytest.mark.slow
def test_wrong_clocks_of_some_producers_harm_no_other_event(tmp_path, stream, source, outcome):
    events = documents(stream)
    now = int(time.time() * 1000)
    shift = now - 60_000 - max(event["time"] for event in events)  # the stream ends a minute ago
    events = [{**event, "time": event["time"] + shift} for event in events]
    wrong = [
        lambda t: t + 7_200_000,
        lambda t: t - 7_200_000,
        lambda t: 1000,
        lambda t: 4_080_000_000_000,
    ]
    mixed: list[dict[str, Any]] = []
    received: list[int] = []
    for number, event in enumerate(events):
        mixed.append(event)
        received.append(event["time"])
        if number % 20 == 19 and event["kind"] == "impression":
            clock = wrong[number // 20 % 4]
            mixed.append(
                {**event, "impression_id": f"wrong-{number}", "time": clock(event["time"])}
            )
            received.append(event["time"])

    class Stamped(Partitions):
        """The broker's times are those at which the events happened."""

        def poll(self, timeout_seconds: float) -> Records:
            records = super().poll(timeout_seconds)
            return Records(
                records.partition,
                records.offset,
                np.array(received, np.int64)[records.offset],
                records.value,
            )

    made = Stamped([encoded(mixed)]) if source == "broker" else Partitions([encoded(mixed)])
    report = finish(trainer(tmp_path / "mixed", made))
    plain = finish(trainer(tmp_path / "plain", Partitions([encoded(events)])))
    assert report["ledger"] == plain["ledger"]
    counters = report["counters"]
    # Where the broker's time is known, the trainer's clock decides nothing.
    reason = "time_in_future" if source == "broker" else "time_ahead_of_clock"
    assert counters[f"rejected.{reason}"] > 50
    assert counters["rejected.time_out_of_range"] > 20
    assert counters["impressions_late"] > 20
    quarantined = counters[f"rejected.{reason}"] + counters["rejected.time_out_of_range"]
    outcome(
        f"{quarantined} quarantined, {counters['impressions_late']} late; the ledger is that of "
        f"the others alone"
    )


@pytest.mark.fault(
    17, injected="a producer's clock 5 to 7 minutes ahead that sets the record time (CreateTime)"
)
def test_a_record_ahead_of_the_trainers_clock_is_counted_apart_and_accepted_later(
    tmp_path: Path, stream: pa.LargeBinaryArray, outcome: Outcome
) -> None:
    events = documents(stream)
    times = np.array([event["time"] for event in events])
    half = int(np.median(times))

    class Created(Partitions):
        """Producers set the times of records, with the clocks of the events."""

        def poll(self, timeout_seconds: float) -> Records:
            records = super().poll(timeout_seconds)
            return Records(records.partition, records.offset, times[records.offset], records.value)

    def read(name: str, seconds_later: float) -> Any:
        clock = half / 1000 - 300 + seconds_later
        around = Surroundings(wall_clock=lambda: clock)
        return finish(trainer(tmp_path / name, Created([stream]), surroundings=around))

    at_once = read("at once", 0)
    later = read("later", (int(times.max()) - half) / 1000)
    much_later = read("much later", 1e6)
    ahead = int((times > half).sum())
    assert at_once["counters"]["rejected.time_ahead_of_clock"] == ahead > 1000
    assert "rejected.time_in_future" not in at_once["counters"]
    assert later["counters"]["rejected"] == 0
    assert later["ledger"] == much_later["ledger"]
    outcome(
        f"{ahead:,} records ahead of the clock are dead letters with a reason of their own; with "
        "none of these the ledger is a function of the log"
    )


@pytest.mark.fault(18, injected="the trainer's wall clock an hour on, and back, between two polls")
@pytest.mark.parametrize("moved", [-3600.0, 3600.0])
@pytest.mark.slow
def test_a_wall_clock_that_jumps_makes_no_partition_idle_and_no_event_late(
    tmp_path, stream, moved, outcome
):
    class Jumping(Live):
        polls = 100

        def wall_clock(self) -> float:
            return time.time() + (moved if self.now >= 20 else 0.0)

    source = Jumping(split(stream, 2))
    report = finish(live(tmp_path / "jumps", source, wall_clock=source.wall_clock))
    plain = finish(live(tmp_path / "plain", Live(split(stream, 2))))
    assert report["counters"]["impressions_late"] == 0
    assert report["seconds"] < 200
    assert (report["examples"], report["ledger"]) == (plain["examples"], plain["ledger"])
    outcome("ledger equal; idleness and cadence go by a clock that nobody sets")


# -- clicks that stop ----------------------------------------------------------------------------


def delayed_clicks(
    events: Sequence[dict[str, Any]], start: float, end: float
) -> list[dict[str, Any]]:
    """The clicks of a stretch of the log come after it, in order."""
    first, last = int(start * len(events)), int(end * len(events))
    stretch = events[first:last]
    return [
        *events[:first],
        *(event for event in stretch if event["kind"] == "impression"),
        *(event for event in stretch if event["kind"] == "click"),
        *events[last:],
    ]


@pytest.mark.slow
def test_impressions_whose_clicks_are_delayed_wait_and_get_their_labels(tmp_path, stream, caplog):
    events = encoded(delayed_clicks(documents(stream), 0.4, 0.8))
    plain = finish(trainer(tmp_path / "plain", Partitions([stream])))
    with caplog.at_level("WARNING"):
        waited = finish(
            trainer(
                tmp_path / "waited",
                Partitions([events], seed=1),
                join={"label_window": "60s", "stall_clicks": 20},
            )
        )
    assert waited["ledger"] == plain["ledger"]
    assert "clicks of clicks:0 are overdue: learning pauses" in caplog.text
    assert "clicks come again: learning goes on" in caplog.text
    deaf = finish(
        trainer(
            tmp_path / "deaf",
            Partitions([events], seed=1),
            join={"label_window": "60s", "stall_clicks": 0},
        )
    )
    assert deaf["counters"]["clicks_late"] > 100, (
        "without the breaker their impressions are taught as not clicked"
    )


@pytest.mark.slow
def test_a_log_that_ends_while_its_clicks_are_overdue_teaches_nothing_of_them_and_goes_on_later(
    tmp_path, stream
):
    events = delayed_clicks(documents(stream), 0.5, 1.0)
    join = {"label_window": "60s", "stall_clicks": 20}
    cut = next(
        i
        for i in range(len(events) // 2, len(events))
        if events[i]["kind"] == "click" and events[i - 1]["kind"] == "impression"
    )
    while any(event["kind"] == "impression" for event in events[cut:]):
        cut += 1
    stopped = finish(trainer(tmp_path, Partitions([encoded(events[:cut])]), join=join))
    assert stopped["stalled"] == ["clicks:0"]
    assert stopped["pending"] > 1000
    resumed = trainer(tmp_path, Partitions([encoded(events)]), join=join)
    resumed.restore(snapshot.newest(tmp_path / "snapshots"))
    assert (
        finish(resumed)["ledger"]
        == finish(trainer(tmp_path / "plain", Partitions([stream])))["ledger"]
    )


def apart(
    stream: pa.LargeBinaryArray, keep: Callable[[dict[str, Any]], bool]
) -> list[pa.LargeBinaryArray]:
    """Two partitions by id, without the events that are not kept."""
    events = [event for event in documents(stream) if keep(event)]
    return [
        encoded([event for event in events if zlib.crc32(event["impression_id"].encode()) % 2 == p])
        for p in range(2)
    ]


def test_partitions_that_are_ahead_of_one_that_ended_stalled_are_read_to_their_end(tmp_path):
    stream = pa.concat_arrays([batch.value for batch in Simulation(20_000, seed=3).batches()])
    third = documents(stream)[len(stream) // 3]["time"]
    logs = apart(
        stream,
        lambda e: (
            e["kind"] == "impression"
            or e["time"] < third
            or zlib.crc32(e["impression_id"].encode()) % 2 == 0
        ),
    )
    report = finish(
        trainer(
            tmp_path, Partitions(logs, seed=1), join={"label_window": "20s", "stall_clicks": 20}
        )
    )
    assert report["kind"] == "final"
    assert report["stalled"] == ["clicks:1"]
    assert report["counters"]["records"] == sum(map(len, logs))


def test_a_topic_of_clicks_that_ends_early_teaches_nothing_of_the_impressions_after_it(
    tmp_path, stream
):
    events = documents(stream)
    third = events[len(events) // 3]["time"]
    impressions = encoded([event for event in events if event["kind"] == "impression"])
    clicks = encoded(
        [event for event in events if event["kind"] == "click" and event["time"] < third]
    )
    source = Partitions([impressions, clicks], seed=1)
    source.partitions = (("impressions", 0), ("clicks", 0))
    report = finish(trainer(tmp_path, source, join={"label_window": "20s", "stall_clicks": 20}))
    assert report["stalled"] == ["clicks:0"]
    assert report["examples"] < IMPRESSIONS * 0.6
    assert report["pending"] == IMPRESSIONS - report["examples"]


@pytest.mark.parametrize("why", ["no broker answers", "the trainer was away"])
@pytest.mark.slow
def test_partitions_are_not_idle_while_brokers_are_silent_or_nobody_listened(tmp_path, stream, why):
    """Two partitions 20 s apart; no broker of the one behind answers for 40 s."""
    logs = apart(stream, lambda event: True)
    times = [np.array([event["time"] for event in documents(log)]) for log in logs]
    middle = int(times[0][len(times[0]) // 2])
    ahead, behind = (int(np.searchsorted(times[p], middle - 20_000 * p)) for p in range(2))

    class Apart(Live):
        polls = 1000
        step = 0

        def poll(self, timeout_seconds: float) -> Records:
            self.step += 1
            upto = {1: (ahead, behind), 2: (ahead, behind), 3: (len(logs[0]), behind)}.get(
                self.step, (len(logs[0]), len(logs[1]))
            )
            if self.step == 2 and disturbed:
                self.now += 40
            if self.step == 5 and self.trainer:
                self.trainer.stop()
            parts = [
                (np.full(to - at, p, np.int32), np.arange(at, to))
                for p, (at, to) in enumerate(zip(self._at, upto, strict=True))
            ]
            values = [
                self._values[p].slice(at, to - at)
                for p, (at, to) in enumerate(zip(self._at, upto, strict=True))
            ]
            self._at = list(upto)
            partition, offset = (np.concatenate(column) for column in zip(*parts, strict=True))
            return Records(partition, offset, np.full(len(offset), -1), pa.concat_arrays(values))

        def caught_up(self) -> np.ndarray:
            return np.array([True, True])

        def silent_seconds(self) -> float:
            return 40.0 if disturbed and self.step == 2 and why == "no broker answers" else 0.0

    ledgers = []
    for disturbed in (False, True):
        report = finish(
            live(
                tmp_path / str(disturbed),
                Apart(logs),
                join={"label_window": "20s", "allowed_lateness": "5s"},
            )
        )
        assert report["counters"]["impressions_late"] == 0
        ledgers.append(report["ledger"])
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
def test_a_run_that_is_stopped_while_its_last_windows_close_goes_on_bit_for_bit(tmp_path, stream):
    join = {"label_window": "1h"}
    finish(trainer(tmp_path / "whole", Partitions([stream]), join=join))
    stopped = trainer(tmp_path / "parts", Partitions([stream]), join=join)
    drain, calls = stopped.state.joiner.drain, []

    def drain_some() -> Any:
        calls.append(1)
        if len(calls) == 2:
            stopped.stop()
        return drain(1000)

    stopped.state.joiner.drain = drain_some
    assert finish(stopped)["kind"] == "stopped"
    resumed = trainer(tmp_path / "parts", Partitions([stream]), join=join)
    resumed.restore(snapshot.newest(tmp_path / "parts" / "snapshots"))
    finish(resumed)
    assert taken(tmp_path / "parts").weights_sha256 == taken(tmp_path / "whole").weights_sha256


def test_many_bad_records_and_then_good_ones_are_still_a_flood(tmp_path, stream):
    polls = [pa.array([b"junk"] * 900, pa.large_binary()), stream.slice(0, 200)]
    with pytest.raises(DataError, match=r"900 of 1000 records read are bad.*the last: not_json"):
        finish(trainer(tmp_path, BatchSource(lambda: polls)))


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.fault(
    22,
    injected="a number of 1e38 in one impression of 500, with numeric_encoding = value",
)
@pytest.mark.slow
def test_numbers_beyond_all_bounds_are_cut_and_all_examples_are_learned(tmp_path, stream, outcome):
    events = documents(stream)
    numbers = [field.name for field in SIMULATED_FIELDS if field.kind == "numeric"]

    def run(directory):
        built = trainer(
            directory,
            Partitions([encoded(events)]),
            features={"numeric_encoding": "value"},
            fitted=Fitted({}, dict.fromkeys(numbers, 10.0)),  # as a run is, to its first records
            **RIVER,
            **FREQUENT,
        )
        return built, finish(built)

    _, plain = run(tmp_path / "plain")
    huge = 0
    for number, event in enumerate(events):
        if number % 500 == 250 and event["kind"] == "impression":
            event["features"][numbers[0]] = 1e38
            huge += 1
    built, report = run(tmp_path / "huge")
    assert not {"examples_skipped", "batches_skipped"} & report["counters"].keys()
    assert report["models"]["deepfm"]["count"] == report["examples"] == IMPRESSIONS
    logloss = report["models"]["deepfm"]["logloss"]
    assert logloss == pytest.approx(plain["models"]["deepfm"]["logloss"], abs=0.002)
    assert all(
        np.isfinite(array).all() for array in built.state.learners["deepfm"].weights().values()
    )
    outcome(f"{huge} numbers cut to 4 scales of their field; all examples learned; weights finite")


@pytest.mark.fault(22, injected="weights that become NaN while it learns")
def test_batches_that_are_not_finite_are_skipped_and_then_the_model_goes_back(
    tmp_path, stream, outcome, caplog
):
    built = trainer(
        tmp_path,
        Partitions([stream]),
        learn={
            "batch_size": 128,
            "threads": 1,
            "table_optimizer": "adagrad",
            "skips_before_rollback": 3,
        },
        **FREQUENT,
    )
    learn, calls = built.state.learners["deepfm"].learn, []

    def spoiled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 30:
            built.state.learners["deepfm"].table.rows.fill_(float("nan"))
        return learn(*arguments, **options)

    built.state.learners["deepfm"].learn = spoiled
    report = finish(built)
    counters = report["counters"]
    assert (counters["batches_skipped"], counters["rollbacks"]) == (3, 1)
    assert counters["examples_skipped"] == 3 * 128
    assert report["examples"] == IMPRESSIONS - 3 * 128
    assert "goes back to snapshot 00000003" in caplog.text
    for name in snapshot.snapshot_ids(tmp_path / "snapshots"):
        _, tensors = snapshot.load(tmp_path / "snapshots" / name, stems=("model",))
        assert all(np.isfinite(array).all() for array in tensors["model"].values())
    outcome(
        "3 batches skipped, then back to the last good snapshot; no snapshot with a NaN; learning "
        "goes on"
    )


@pytest.mark.fault(22, injected="learning rate x 1e6 from a good snapshot on")
def test_a_model_that_diverges_again_and_again_stops_the_run_and_what_is_published_stays_good(
    tmp_path, stream, outcome
):
    sections = {
        "learn": {
            "batch_size": 128,
            "threads": 1,
            "table_optimizer": "adagrad",
            "skips_before_rollback": 2,
        }
    }
    built = trainer(
        tmp_path,
        Partitions([stream, stream]),
        snapshots={"gate_clicks": 50},
        **sections,
        **FREQUENT,
    )
    learn, calls = built.state.learners["deepfm"].learn, []

    def wild(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) >= 30:
            built.state.learners["deepfm"].adam.learning_rate = 1e35
        return learn(*arguments, **options)

    built.state.learners["deepfm"].learn = wild
    with pytest.raises(
        DataError, match=r"the model diverged: .*going back to 0000000\d-.* did not help 3 times"
    ):
        finish(built)
    pointed = published(tmp_path)
    assert pointed
    assert pointed.examples <= 29 * 128
    outcome(
        "skipped, rolled back three times, then exit 5; the published snapshot is from before",
        times=1,
    )


@pytest.mark.slow
def test_a_snapshot_that_is_worse_than_the_published_one_is_kept_but_not_published(
    tmp_path, stream, caplog
):
    class Forgets(Partitions):
        """Somewhere in the stream the table is filled with nonsense, finite as it is."""

        done = False

        def poll(self, timeout_seconds: float) -> Records:
            if self._at[0] > 3000 and self.trainer and not self.done:
                self.done = True
                learner: Any = self.trainer.state.learners["deepfm"]
                learner.table.rows[:, :4].add_(3.0)
            return super().poll(timeout_seconds)

    built = trainer(
        tmp_path, Forgets([stream]), **RIVER, snapshots={"gate_clicks": 100, "keep": 20}, **FREQUENT
    )
    report = finish(built)
    manifests = [
        snapshot.read_manifest(tmp_path / "snapshots" / name)
        for name in snapshot.snapshot_ids(tmp_path / "snapshots")
    ]
    refused = [manifest.sequence for manifest in manifests if manifest.gate.refused]
    assert refused
    assert refused[0] > 1
    assert report["counters"]["publications_refused"] == len(refused)
    assert "is not published: its logloss is" in caplog.text
    last = published(tmp_path)
    assert last
    assert last.sequence == max({manifest.sequence for manifest in manifests} - set(refused))


# -- files ---------------------------------------------------------------------------------------


def fill(path: Path) -> None:
    """Take all the room there is."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.fault(
    19, injected="a tmpfs that is full while snapshots are due, and has room again later"
)
@pytest.mark.slow
def test_a_full_disk_does_not_stop_learning_and_snapshots_go_on_when_there_is_room(
    embedded_broker, topic, small_disk, log, clean, outcome
):
    """Read from a topic, so that later events cannot be learned before the disk is full."""
    state, filler = small_disk / "state", small_disk / "filler"
    options = [
        "-X",
        "schedule.snapshot_examples=512",
        "-X",
        "snapshots.keep=1",
        "-X",
        "schedule.report_every=200ms",
        *own_topics(topic),
    ]
    arguments = [
        "run",
        "--topic",
        topic,
        "--bootstrap-servers",
        embedded_broker,
        "--state",
        str(state),
        *SMALL,
        *options,
    ]
    values = pa.concat_arrays([batch.value for batch in open_log(log).batches()])
    client = kafka.client_options(embedded_broker, {})
    kafka.ensure_topic(client, topic)
    with contextlib.closing(kafka.KafkaSink(client)) as sink:

        def send(part: slice) -> None:
            sink.send_batch(topic, values[part])
            sink.flush(PATIENCE_SECONDS)

        send(slice(2000))
        process = started(forks.start(*arguments, stderr=subprocess.PIPE, text=True))
        wait_until(lambda: (state / "latest.json").exists())
        fill(filler)
        send(slice(2000, 4000))
        said = read_until(process, "nothing was ")
        assert published(state), "the old one stays, and is whole"
        filler.unlink()
        send(slice(4000, None))
        wait_until(lambda: read_pointer(state / "latest.json").examples > 2000)
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode in (0, 3), (
        said
    )  # 3: a line of reports.jsonl was lost, and the end says so
    assert last_report(state)["counters"]["snapshots_failed"] > 0
    drained = CliRunner().invoke(main, [*arguments, "--until-end"])
    assert drained.exit_code == 0, drained.output
    assert taken(state).ledger == taken(clean).ledger
    assert taken(state).weights_sha256 == taken(clean).weights_sha256
    outcome(
        "learning goes on, the old snapshot stays, later ones are written; ledger and weights equal"
    )


@pytest.mark.fault(
    20,
    injected="a byte flipped, a file cut, two files swapped, a bit of a position flipped, a key "
    "of the manifest removed, in the newest snapshot; then in all",
)
@pytest.mark.parametrize(
    "harm",
    [
        *("cut", "position"),
        *only_long(("flip", "swap", "torn manifest", "key")),
    ],
)
@pytest.mark.slow
def test_a_damaged_snapshot_is_passed_over_for_the_one_before_and_none_left_is_exit_6(
    log, clean, tmp_path, harm, outcome
):
    def damage(path: Path) -> None:
        model, optimizer = path / "model.safetensors", path / "optimizer.safetensors"
        if harm == "flip":
            data = bytearray(model.read_bytes())
            data[len(data) // 2] ^= 1
            model.write_bytes(data)
        elif harm == "cut":
            os.truncate(model, model.stat().st_size - 1)
        elif harm == "swap":
            model.rename(path / "x")
            optimizer.rename(model)
            (path / "x").rename(optimizer)
        elif harm == "position":
            text = (path / "manifest.json").read_bytes()
            found = re.search(rb'"positions": \{\s*"[^"]*": (\d)', text)
            assert found
            data = bytearray(text)
            data[found.start(1)] ^= 1
            (path / "manifest.json").write_bytes(data)
        elif harm == "key":
            text = (path / "manifest.json").read_bytes()
            (path / "manifest.json").write_bytes(re.sub(rb'\n "ledger": \{[^}]*\},', b"", text))
        else:
            os.truncate(path / "manifest.json", 100)

    options = ["-X", "schedule.snapshot_examples=1024", "-X", "snapshots.keep=9"]
    assert run(log, tmp_path, *options).exit_code == 0
    names = snapshot.snapshot_ids(tmp_path / "snapshots")
    damage(tmp_path / "snapshots" / names[-1])
    again = run(log, tmp_path, *options)
    assert again.exit_code == 0, again.output
    assert f"resumed from snapshot {names[-2]}" in again.output
    assert taken(tmp_path).ledger == taken(clean).ledger
    assert taken(tmp_path).tensors == taken(clean).tensors
    for name in snapshot.snapshot_ids(tmp_path / "snapshots"):
        if name != names[-1]:
            damage(tmp_path / "snapshots" / name)
    none = run(log, tmp_path, *options)
    assert none.exit_code == 6
    assert "verifies" in none.output
    outcome(
        "refused by name, the one before is gone on from, ledger and state equal; with none left "
        "exit 6",
        times=2,
    )


# -- the process ---------------------------------------------------------------------------------


@pytest.mark.fault(3, injected="a second SIGTERM while the first is being served")
@pytest.mark.slow
def test_a_second_signal_ends_at_once(log, clean, tmp_path, outcome):
    process = run_apart(log, tmp_path, failpoint="learn.before:3=sleep:600")
    read_until(process, "learn.before:3")
    assert catches(process.pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: not catches(process.pid, signal.SIGTERM))
    assert process.poll() is None, "the first waits for the batch"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGTERM
    assert run(log, tmp_path).exit_code == 0
    assert taken(tmp_path).tensors == taken(clean).tensors
    outcome("ends at once; the next run equals one that was not disturbed")


@pytest.mark.fault(
    23, injected="memory runs out in a batch (failpoint), once before and once after a snapshot"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "failpoint", ["learn.before:3=out-of-memory", "learn.before:20=out-of-memory"]
)
def test_running_out_of_memory_is_told_and_a_resumed_run_equals_one_that_did_not(
    log, clean, tmp_path, failpoint, outcome
):
    options = ["-X", "schedule.snapshot_examples=1024", "-X", "snapshots.keep=1"]
    process = run_apart(log, tmp_path, *options, failpoint=failpoint)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, said
    assert "error: out of memory" in said
    assert "learn.batch_size" in said
    assert "Traceback" not in said
    assert run(log, tmp_path, *options).exit_code == 0
    assert taken(tmp_path).ledger == taken(clean).ledger
    assert taken(tmp_path).tensors == taken(clean).tensors
    outcome(
        "exit 1 with the way out; resumed, ledger and state equal (the error itself is made, not "
        "a card's)"
    )


@pytest.mark.fault(
    30, injected="5 s of work in the loop over the times of 5 snapshots and reports (failpoint)"
)
@pytest.mark.slow
def test_what_is_due_while_the_loop_is_busy_comes_late_and_once(log, tmp_path, outcome):
    options = [
        "-X",
        "schedule.snapshot_every=1s",
        "-X",
        "schedule.report_every=1s",
        "-X",
        "snapshots.keep=99",
    ]
    process = run_apart(log, tmp_path, *options, failpoint="learn.before:20=sleep:5")
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    kinds = [
        json.loads(line)["kind"] for line in (tmp_path / "reports.jsonl").read_text().splitlines()
    ]
    others = last_report(tmp_path)["seconds"] - 5  # in which it was not busy
    assert 1 <= kinds.count("report") <= others + 2
    # The late one, and the last.
    assert 2 <= len(snapshot.snapshot_ids(tmp_path / "snapshots")) <= others + 3
    outcome("one report and one snapshot right after, none skipped, none twice")


@pytest.mark.fault(
    24,
    injected="every categorical value drawn by Zipf's law with exponent 3; 200,000 clicks of one "
    "id",
)
@pytest.mark.slow
def test_one_hot_key_is_learned_like_any_other_and_costs_no_more_than_its_share(
    tmp_path, stream, full, outcome
):
    clicks = 200_000 if full else 20_000
    events = documents(stream)
    rng = np.random.default_rng(0)
    for event in events:
        for name, value in event.get("features", {}).items():
            if isinstance(value, str):
                event["features"][name] = f"v{min(int(rng.zipf(3.0)), 1_000_000)}"
    last = {"kind": "click", "impression_id": "hot", "time": events[len(events) // 2]["time"]}
    hot = encoded([*events[: len(events) // 2], *[last] * clicks, *events[len(events) // 2 :]])
    began = time.monotonic()
    finish(trainer(tmp_path / "even", Partitions([stream])))
    even = time.monotonic() - began
    began = time.monotonic()
    report = finish(trainer(tmp_path / "hot", Partitions([hot])))
    slower = (time.monotonic() - began) / even
    assert report["examples"] == IMPRESSIONS
    counters = report["counters"]
    assert counters["clicks_unmatched"] == MOST_WAITING_OF_AN_ID
    assert counters["clicks_evicted"] == clicks - MOST_WAITING_OF_AN_ID
    assert all(np.isfinite(score["logloss"]) for score in report["models"].values())
    outcome(
        f"all learned; the run took {slower:.1f} times as long as one over an even stream without "
        f"those clicks"
    )


# -- subscribers ---------------------------------------------------------------------------------


@pytest.mark.fault(
    26,
    injected="SIGSTOP of a subscriber while 3 snapshots are published and 3 removed; SIGKILL of "
    "another",
)
@pytest.mark.slow
def test_a_slow_or_dying_subscriber_disturbs_nobody_and_catches_up(log, clean, tmp_path, outcome):
    follow = ["subscribe", "--state", tmp_path, "--json"]
    options = ["-X", "schedule.snapshot_examples=1024", "-X", "snapshots.keep=1"]
    # The trainer has ended when the first snapshot is published, and goes on when they have it.
    run_apart(log, tmp_path, *options, failpoint="pointer.after").communicate(
        timeout=PATIENCE_SECONDS
    )
    slow, dying = (
        started(forks.start(*follow, stdout=subprocess.PIPE, text=True)) for _ in range(2)
    )
    assert slow.stdout
    assert dying.stdout
    first, _ = (json.loads(one.stdout.readline()) for one in (slow, dying) if one.stdout)
    assert first["examples"] == 1024
    slow.send_signal(signal.SIGSTOP)
    dying.kill()
    process = run_apart(log, tmp_path, *options)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    assert taken(tmp_path).tensors == taken(clean).tensors
    slow.send_signal(signal.SIGCONT)
    loaded = json.loads(slow.stdout.readline())
    while loaded["examples"] < 4000:
        loaded = json.loads(slow.stdout.readline())
    assert loaded["sequence"] > first["sequence"]
    assert loaded["verified"]
    outcome(
        "the trainer's state equals that of a run without subscribers; the slow one has the "
        "newest after SIGCONT"
    )


@pytest.mark.slow
def test_a_snapshot_that_is_removed_while_it_is_loaded_leaves_the_one_in_use(log, tmp_path, caplog):
    assert (
        run(
            log, tmp_path, "-X", "schedule.snapshot_examples=1024", "-X", "snapshots.keep=9"
        ).exit_code
        == 0
    )
    names = snapshot.snapshot_ids(tmp_path / "snapshots")
    subscriber = Subscriber(tmp_path)
    assert subscriber.next(PATIENCE_SECONDS)
    before = subscriber.scorer
    manifest = snapshot.verify(tmp_path / "snapshots" / names[0])
    later = structs.replace(manifest, sequence=99)
    write_pointer(tmp_path / "latest.json", pointer_for(tmp_path / "snapshots" / names[0], later))
    (tmp_path / "snapshots" / names[0] / "model.safetensors").unlink()
    assert subscriber.next(0.5) is None
    assert subscriber.scorer is before
    assert "model.safetensors: No such file" in caplog.text


@pytest.mark.fault(
    29,
    injected="by hand: an older epoch, an older sequence, nonsense, another model, a null; then a "
    "newer one",
)
@pytest.mark.slow
def test_pointers_that_are_withdrawn_old_or_reordered_leave_the_model_in_use(
    broker, topic, log, tmp_path, outcome, caplog
):
    assert (
        run(
            log, tmp_path, "-X", "schedule.snapshot_examples=1024", "-X", "snapshots.keep=9"
        ).exit_code
        == 0
    )
    paths = [
        tmp_path / "snapshots" / name for name in snapshot.snapshot_ids(tmp_path / "snapshots")
    ]
    pointers = [pointer_for(path, snapshot.verify(path), epoch=5) for path in paths]
    client = kafka.client_options(broker, {})
    kafka.ensure_topic(client, topic, compacted=True)
    sink, reader = kafka.KafkaSink(client), kafka.PointerReader(client, topic)

    def send(value: bytes | None, key: bytes = b"default") -> None:
        sink.send(topic, value, key=key)
        sink.flush(PATIENCE_SECONDS)

    subscriber = Subscriber(TopicPointers(reader))
    # Reordered within one poll: the newest is taken, not the last.
    for pointer in (pointers[2], pointers[1]):
        sink.send(topic, encode_pointer(pointer), key=b"default")
    sink.flush(PATIENCE_SECONDS)
    wait_until(lambda: subscriber.next(0.5))
    assert subscriber.pointer == pointers[2]
    for value, key in (
        (encode_pointer(structs.replace(pointers[3], epoch=4)), b"default"),
        (encode_pointer(pointers[1]), b"default"),
        (b"{nonsense", b"default"),
        (encode_pointer(pointers[3]).replace(b"/snapshots/", b"/etc/"), b"default"),
        (encode_pointer(pointers[3]), b"another"),
        (None, b"default"),
    ):
        send(value, key)
        assert subscriber.next(0.7) is None
        assert subscriber.pointer == pointers[2]
    send(encode_pointer(pointers[3]))
    wait_until(lambda: subscriber.next(0.5))
    assert subscriber.pointer == pointers[3]  # so it has read all that was sent before
    assert "was withdrawn; the loaded one stays" in caplog.text
    sink.close()
    reader.close()
    outcome(
        "all six are ignored and said so, the model in use stays; the newer one is loaded", times=6
    )


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.fault(
    25,
    injected="a label window of 25,000 impressions, join.max_memory = 4MB, spilling; stopped and "
    "resumed halfway",
)
@pytest.mark.slow
def test_a_run_that_spills_equals_one_that_does_not_also_when_it_is_resumed(tmp_path, outcome):
    many = pa.concat_arrays([batch.value for batch in Simulation(60_000, seed=4).batches()])
    span = json.loads(many[-1].as_py())["time"] - json.loads(many[0].as_py())["time"]
    join = {"label_window": f"{span // 3}ms", "duplicate_horizon": "1s"}
    plain = finish(trainer(tmp_path / "plain", Partitions([many]), join=join))
    assert plain["counters"]["impressions_spilled"] == 0
    bounded = {**join, "max_memory": "4MB"}
    half = finish(
        trainer(tmp_path / "bounded", Partitions([many], stop_after=len(many) // 2), join=bounded)
    )
    assert half["kind"] == "stopped"
    assert list(snapshot.newest(tmp_path / "bounded" / "snapshots").glob("*.arrow")), (
        "what is on disk is in the snapshot"
    )
    resumed = trainer(tmp_path / "bounded", Partitions([many], seed=1), join=bounded)
    resumed.restore(snapshot.newest(tmp_path / "bounded" / "snapshots"))
    report = finish(resumed)
    assert report["counters"]["impressions_spilled"] > 10_000, report["counters"]
    assert report["counters"]["impressions_evicted"] == 0, report["counters"]
    assert report["ledger"] == plain["ledger"]
    assert taken(tmp_path / "bounded").weights_sha256 == taken(tmp_path / "plain").weights_sha256
    assert resumed.state.joiner.nbytes <= 4_000_000
    outcome(
        f"{report['counters']['impressions_spilled']:,} impressions to disk and back; ledger and "
        f"weights equal; within the bound"
    )


@pytest.mark.fault(
    36, injected="one of two partitions an hour behind the other, join.max_memory = 4MB"
)
@pytest.mark.long
def test_a_partition_that_is_an_hour_behind_costs_no_example_within_the_bound(tmp_path, outcome):
    ahead, behind = (
        documents(pa.concat_arrays([batch.value for batch in log.batches()]))
        for log in (Simulation(30_000, seed=4), Simulation(30_000, seed=5))
    )
    for event in behind:
        event["time"] -= 3_600_000
    values = [encoded(ahead), encoded(behind)]
    paused: set[frozenset[int]] = set()

    class Watched(Partitions):
        def pause(self, partitions: frozenset[int]) -> None:
            paused.add(partitions)
            super().pause(partitions)

    join = {"duplicate_horizon": "1s", "idle_timeout": "1h"}
    plain = finish(trainer(tmp_path / "plain", Partitions(values), join=join))
    bounded = {**join, "max_memory": "4MB"}
    report = finish(trainer(tmp_path / "bounded", Watched(values, seed=1), join=bounded))
    counters = report["counters"]
    assert report["examples"] == 60_000
    assert (counters["impressions_late"], counters["impressions_evicted"]) == (0, 0)
    assert report["ledger"] == plain["ledger"]
    assert taken(tmp_path / "bounded").weights_sha256 == taken(tmp_path / "plain").weights_sha256
    assert paused == {frozenset(), frozenset({0})}
    outcome(
        "the one ahead is paused until the other is as far; no impression late or given up; ledger "
        "and weights equal"
    )


@pytest.mark.fault(25, injected="the same with over_memory = evict")
@pytest.mark.slow
def test_a_run_that_may_not_spill_gives_up_a_uniform_share_and_counts_it(tmp_path, outcome):
    many = pa.concat_arrays([batch.value for batch in Simulation(60_000, seed=4).batches()])
    span = json.loads(many[-1].as_py())["time"] - json.loads(many[0].as_py())["time"]
    join = {
        "label_window": f"{span * 2 // 3}ms",
        "duplicate_horizon": "1s",
        "max_memory": "2MB",
        "over_memory": "evict",
    }
    report = finish(trainer(tmp_path, Partitions([many]), join=join))
    evicted = report["counters"]["impressions_evicted"]
    assert 10_000 < evicted < 55_000
    assert report["examples"] + evicted == 60_000
    everything = finish(
        trainer(tmp_path / "all", Partitions([many]), join={"label_window": join["label_window"]})
    )
    assert report["models"]["deepfm"]["ctr"] == pytest.approx(
        everything["models"]["deepfm"]["ctr"], rel=0.1
    )
    outcome(
        f"{evicted:,} of 60,000 given up and counted, the others' click-through rate as before; "
        f"within the bound"
    )


@pytest.mark.fault(
    25,
    injected="ten label windows without clicks, as fast as the trainer takes them, for 600 s; a "
    "bound of 128 MiB",
)
@pytest.mark.long
@pytest.mark.timeout(900)
def test_memory_stays_flat_through_ten_windows_without_a_click(outcome):
    command = [
        sys.executable,
        str(ROOT / "tests" / "faults" / "soak.py"),
        "--through",
        "trainer",
        "--seconds",
        "600",
        "--max-mib",
        "128",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome.details("soak", done.stdout.strip())
    outcome(next(line for line in done.stdout.splitlines() if line.startswith("memory was flat")))


@pytest.mark.figure
@pytest.mark.long
def test_how_long_a_snapshot_keeps_the_learner_waiting(outcome):
    command = [sys.executable, str(ROOT / "tests" / "bench" / "pause.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    outcome.details("pause", done.stdout.strip())
