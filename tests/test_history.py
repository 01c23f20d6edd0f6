"""Inputs one after another teach what one log of all their records would, wherever a run dies."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import command, own_topics, succeed
from support.histories import Cut, Died, assert_equally_learned, cuts, learn
from support.lineage import QUICK, Fingerprint, last_report, newest, published
from support.manifests import edit_manifest
from support.sample_logs import T
from support.topics import sent
from support.trainers import Partitions

from stream_ctr import failpoint
from stream_ctr.events.decoder import Decoder
from stream_ctr.events.features import Hasher
from stream_ctr.join.watermark import Watermarks
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Input
from stream_ctr.train.alignment import Alignment
from stream_ctr.train.ingest import Ingest
from stream_ctr.train.inputs import Inputs

OFTEN: dict[str, Any] = {"schedule": {"snapshot_examples": 256}}
SAME = ("examples", "ledger", "models", "counters", "as_served", "window_curve", "pending")


@pytest.fixture(scope="module")
def records() -> pa.LargeBinaryArray:
    batches = [batch.value for batch in Simulation(2000, seed=3).batches()]
    return pa.concat_arrays(batches)


@pytest.fixture(scope="module")
def whole(records: pa.LargeBinaryArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("whole")
    learn(state, cuts(records, []), in_event_time=True, **OFTEN)
    return state


def assert_went_on_as_one(state: Path, whole: Path) -> None:
    assert_equally_learned(state, whole)
    ours, theirs = last_report(state), last_report(whole)
    for name in SAME:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("read_ahead", [0, 500])
def test_logs_one_after_another_in_one_run_equal_the_whole(
    records: pa.LargeBinaryArray, whole: Path, tmp_path: Path, read_ahead: int
) -> None:
    logs = cuts(records, [300, 301, 1500], seed=7)
    learn(tmp_path, logs, in_event_time=True, input={"read_ahead": read_ahead}, **OFTEN)
    assert_went_on_as_one(tmp_path, whole)


def test_one_run_for_each_log_equals_the_whole(
    records: pa.LargeBinaryArray, whole: Path, tmp_path: Path
) -> None:
    *first, last = cuts(records, [300, 1500], seed=7)
    for log in first:
        report = learn(tmp_path, [log], keep_open=True, in_event_time=True, **OFTEN)
        assert report["kind"] == "final"
        assert report["pending"] > 0
    learn(tmp_path, [last], in_event_time=True, **OFTEN)
    assert_went_on_as_one(tmp_path, whole)


def die_at(monkeypatch: pytest.MonkeyPatch, name: str, time: int = 1) -> None:
    """Let this process die where the environment could let it die."""
    times = iter(range(1, 1_000_000))

    def died() -> None:
        raise Died

    monkeypatch.setattr(failpoint, "_ARMED", failpoint.Armed(name, time))
    monkeypatch.setattr(failpoint, "_REACHED", times)
    monkeypatch.setattr(failpoint, "_act", died)


@pytest.mark.parametrize("name", ["seam.before", "seam.after", "cut.after"])
def test_a_run_that_dies_at_the_seam_and_goes_on_equals_the_whole(
    records: pa.LargeBinaryArray,
    whole: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, name)
        with pytest.raises(Died):
            learn(tmp_path, cuts(records, [900], seed=7), in_event_time=True, **OFTEN)
    learn(tmp_path, cuts(records, [900]), in_event_time=True, **OFTEN)
    assert_went_on_as_one(tmp_path, whole)


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_wherever_logs_are_cut_and_runs_die_what_is_learned_is_the_same(
    records: pa.LargeBinaryArray, whole: Path, data: st.DataObject
) -> None:
    """Each command names all logs; it dies at some record, and is given again."""
    at = st.integers(1, len(records) - 1)
    cut = sorted(data.draw(st.sets(at, min_size=1, max_size=3), label="cut at"))
    deaths = data.draw(st.lists(at, min_size=1, max_size=2), label="die at")
    together = data.draw(st.booleans(), label="one command")
    with tempfile.TemporaryDirectory() as directory:
        state = Path(directory)
        for number, death in enumerate([*deaths, None]):
            logs = cuts(records, cut, seed=number)
            if death is not None:
                _die_at_record(logs, death)
            try:
                if together:
                    learn(state, logs, in_event_time=True, **OFTEN)
                else:
                    _learn_each(state, logs)
            except Died:
                continue
        assert_went_on_as_one(state, whole)


def _die_at_record(logs: list[Cut], record: int) -> None:
    for log in logs:
        if record < log.length:
            log.dies_at = record
            return
        record -= log.length


def _learn_each(state: Path, logs: list[Cut]) -> None:
    """Go on with the log that comes next, one run for each."""
    path = snapshot.newest(state / "snapshots")
    inputs = snapshot.read_manifest(path).inputs if path else ()
    done = len([each for each in inputs if each.ended])
    for log in logs[done:]:
        learn(state, [log], keep_open=log is not logs[-1], in_event_time=True, **OFTEN)


def test_windows_are_closed_between_runs_unless_they_are_kept_open(
    records: pa.LargeBinaryArray, tmp_path: Path
) -> None:
    first, second = cuts(records, [900])
    report = learn(tmp_path, [first], **OFTEN)
    assert report["pending"] == 0
    report = learn(tmp_path, [second], **OFTEN)
    assert report["counters"]["clicks_late"] > 0  # of the impressions whose windows were closed


def test_what_was_kept_open_is_closed_by_the_same_command_without_it(
    records: pa.LargeBinaryArray, tmp_path: Path
) -> None:
    def log() -> list[Cut]:
        return cuts(records, [900])[:1]

    learn(tmp_path / "closed", log(), **OFTEN)
    assert learn(tmp_path / "open", log(), keep_open=True, **OFTEN)["pending"] > 0
    assert learn(tmp_path / "open", log(), **OFTEN)["pending"] == 0
    assert_equally_learned(tmp_path / "open", tmp_path / "closed")


def test_a_log_that_has_grown_is_read_on(
    records: pa.LargeBinaryArray, whole: Path, tmp_path: Path
) -> None:
    learn(tmp_path, [Cut("log0", records[:900])], keep_open=True, in_event_time=True, **OFTEN)
    learn(tmp_path, [Cut("log0", records, seed=5)], in_event_time=True, **OFTEN)
    assert_went_on_as_one(tmp_path, whole)


def test_that_a_log_has_ended_is_kept_though_nothing_was_read_since_the_last_snapshot(
    records: pa.LargeBinaryArray, tmp_path: Path
) -> None:
    """The last snapshot of the first run is one of a run that did not know that the log ends."""
    log = cuts(records, [900])[0]
    learn(tmp_path, [log], keep_open=True, **OFTEN)
    path = snapshot.newest(tmp_path / "snapshots")
    assert path
    ended = snapshot.read_manifest(path).inputs
    edit_manifest(path, lambda document: document["inputs"][0].update(ended=False))
    learn(tmp_path, cuts(records, [900])[:1], keep_open=True, **OFTEN)
    path = snapshot.newest(tmp_path / "snapshots")
    assert path
    assert snapshot.read_manifest(path).inputs == ended
    assert ended[0].ended


def test_logs_in_the_wrong_order_are_named(
    records: pa.LargeBinaryArray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = cuts(records, [900])
    learn(tmp_path, [second, first], **OFTEN)
    assert re.search(
        r"\d+ of the first \d+ impressions of log0 are late: .*; give logs in the order",
        caplog.text,
    )
    learn(tmp_path / "right", cuts(records, [900]), **OFTEN)
    assert caplog.text.count("are late") == 1


# -- clicks that are overdue at the seam ---------------------------------------------------------


@pytest.fixture(scope="module")
def stalling(stream: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """A stream with its clicks of a stretch after the stretch."""
    records = stream[:4800]
    stretch = records[3000:3900].to_pylist()
    shown = [value for value in stretch if b'"impression",' in value]
    clicks = [value for value in stretch if b'"impression",' not in value]
    moved = pa.array([*shown, *clicks], pa.large_binary())
    return pa.concat_arrays([records[:3000], moved, records[3900:]])


SHORT = {"label_window": "15s", "allowed_lateness": "0s"}
STALLS: dict[str, Any] = {**OFTEN, "join": {**SHORT, "stall_clicks": 10.0}, "in_event_time": True}
HASTY: dict[str, Any] = {**STALLS, "join": {**SHORT, "stall_clicks": 0.0}}


@pytest.mark.slow
def test_clicks_that_are_overdue_at_the_end_of_a_log_come_in_the_next_one(
    stalling: pa.LargeBinaryArray, tmp_path: Path
) -> None:
    whole = learn(tmp_path / "whole", cuts(stalling, []), **STALLS)
    assert whole["stalls"] == 1
    first, second = cuts(stalling, [3600], seed=9)
    ended = learn(tmp_path / "parts", [first], keep_open=True, **STALLS)
    assert ended["stalled"] == ["log0:0"]
    assert learn(tmp_path / "parts", [second], **STALLS)["stalled"] == []
    assert_equally_learned(tmp_path / "parts", tmp_path / "whole")
    # Without waiting for them, other labels would be learned.
    hasty = learn(tmp_path / "hasty", cuts(stalling, []), **HASTY)
    assert hasty["models"]["deepfm"]["ctr"] < whole["models"]["deepfm"]["ctr"]


class Live(Partitions):
    """A topic that goes on."""

    until_end = False


def test_partitions_are_read_on_though_a_log_that_has_ended_waits_for_their_clicks() -> None:
    """They bring the clicks that it waits for: to pause them would be for ever."""
    marks = Watermarks(partitions=3, lateness_ms=0, stall_clicks=1)
    marks.begin(range(1))
    marks.observe(np.zeros(2, int), np.array([1000, 9000]))
    marks.stalled[0] = True
    marks.begin(range(1, 3))
    marks.observe(np.array([1, 2]), np.array([50_000, 60_000]))
    topic = Live([pa.array([b""], pa.large_binary())] * 2)
    ingest = Ingest(Inputs([topic], ended=[LOG]), Decoder(()), Hasher((), table_bits=4))
    ingest.take(0)
    assert ingest.status().idle.tolist() == [True, False, False]  # it is not waited for
    paused: list[frozenset[int]] = []
    fake: Any = ingest
    fake.pause = paused.append
    Alignment(ingest).update(_full(watermark=9000), marks, ingest.status())
    assert paused == []
    marks.stalled[0] = False
    Alignment(ingest).update(_full(watermark=50_000), marks, ingest.status())
    assert paused == [frozenset({2})]


def _full(watermark: int) -> Any:
    """Return what is looked at of a joiner whose memory is taken."""
    return SimpleNamespace(filled=1.0, watermark=watermark, label_window_ms=100)


LOG = Input(kind="log", partitions=("log:0",), ended=True)


# -- a log, then a topic -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(records: pa.LargeBinaryArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the whole stream as a log, and its beginning."""
    folder = tmp_path_factory.mktemp("history")
    for name, part in (("whole", records), ("history", records[:HISTORY])):
        lines = b"".join(value + b"\n" for value in part.to_pylist())
        (folder / f"{name}.jsonl").write_bytes(lines)
    return folder


HISTORY = 1500  # records
COMMAND = [
    "--model",
    "deepfm",
    *QUICK,
    "-X",
    "schedule.snapshot_examples=256",
    "-X",
    "metrics.served_share=1",
]


@pytest.fixture(scope="module")
def whole_log(history: Path) -> Path:
    state = history / "state"
    succeed("run", "--source", history / "whole.jsonl", "--state", state, *COMMAND)
    return state


def taken(state: Path) -> Fingerprint:
    found = newest(state)
    assert found
    return found


def joined(state: Path) -> dict[str, int]:
    """Return the counters of the last report, without those of what was served.

    A log publishes by event time, a topic with its snapshots.
    """
    return {
        name: count
        for name, count in last_report(state)["counters"].items()
        if not name.startswith(("examples_before", "publications"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", ["", "seam.before", "seam.after", "commit.after"])
def test_a_log_then_a_topic_equal_one_log_of_both(
    broker: str,
    topic: str,
    records: pa.LargeBinaryArray,
    history: Path,
    whole_log: Path,
    tmp_path: Path,
    dies_at: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent(broker, topic, records[HISTORY:])
    state = ["--state", tmp_path, *COMMAND]
    first = succeed("run", "--source", history / "history.jsonl", "--keep-open", *state)
    assert "impressions wait for the input that follows" in first.output
    then = ["run", "--topic", topic, "--bootstrap-servers", broker, "--until-end", *state]
    then += ["-X", f"metrics.topic={topic}.metrics", "-X", f"snapshots.topic={topic}.snapshots"]
    if dies_at:
        with monkeypatch.context() as patch:
            die_at(patch, dies_at)
            assert isinstance(command(*then).exception, Died)
    done = succeed(*then)
    goes_on = f"goes on after history.jsonl ({HISTORY:,} records) with topic {topic}"
    if dies_at in ("", "seam.before", "seam.after"):
        assert goes_on in done.output
    ours, theirs = taken(tmp_path), taken(whole_log)
    assert (ours.ledger, ours.weights_sha256) == (theirs.ledger, theirs.weights_sha256)
    assert ours.same(theirs, *(ours.tensors.keys() - {"joiner"}))
    assert joined(tmp_path) == joined(whole_log)
    # What the log published serves the impressions of the topic until snapshots of it do.
    served = last_report(tmp_path)["as_served"]["models"]["deepfm"]["count"]
    assert served == 2000 - last_report(tmp_path)["counters"]["examples_before_publication"] > 0
    pointed = published(tmp_path)
    assert pointed
    assert pointed.examples == 2000


def test_what_a_log_has_brought_is_not_learned_again_from_a_topic_that_begins_before_its_end(
    embedded_broker: str,
    topic: str,
    records: pa.LargeBinaryArray,
    history: Path,
    whole_log: Path,
    tmp_path: Path,
) -> None:
    sent(embedded_broker, topic, records[HISTORY - 400 :])
    state = ["--state", tmp_path, *COMMAND]
    succeed("run", "--source", history / "history.jsonl", "--keep-open", *state)
    succeed("run", "--topic", topic, "--bootstrap-servers", embedded_broker, "--until-end", *state)
    assert taken(tmp_path).weights_sha256 == taken(whole_log).weights_sha256
    assert taken(tmp_path).ledger == taken(whole_log).ledger
    counters = joined(tmp_path)
    again = ("impressions_duplicate", "impressions_late", "clicks_duplicate", "clicks_late")
    more = sum(counters[name] - joined(whole_log)[name] for name in again)
    assert more + counters["clicks_unmatched"] - joined(whole_log)["clicks_unmatched"] == 400


def test_a_topic_of_several_partitions_goes_on_after_a_log(
    embedded_broker: str,
    topic: str,
    records: pa.LargeBinaryArray,
    history: Path,
    whole_log: Path,
    tmp_path: Path,
) -> None:
    """Its partitions are polled in any order, and with what was open they give the same labels."""
    sent(embedded_broker, topic, records[HISTORY:], partitions=3)
    state = ["--state", tmp_path, *COMMAND, *own_topics(topic)]
    succeed("run", "--source", history / "history.jsonl", "--keep-open", *state)
    then = ["run", "--topic", topic, "--bootstrap-servers", embedded_broker, "--until-end", *state]
    succeed(*then)
    assert taken(tmp_path).ledger == taken(whole_log).ledger
    assert joined(tmp_path) == joined(whole_log)
    names = taken(tmp_path).positions
    assert list(names) == [next(iter(names)), *(f"{topic}:{number}" for number in range(3))]
    assert names[f"{topic}:2"] == len(records[HISTORY + 2 :: 3])
    # The log is done with: nothing of it is needed any more.
    again = succeed(*then)
    assert "goes on after" not in again.output


# -- logs of labelled rows, which wait for no click ----------------------------------------------


LABELLED = [
    part for name in ("time", "id", "label") for part in ("-X", f"input.columns.{name}={name}")
]


@pytest.mark.parametrize("keep_open", [True, False])
def test_two_files_of_labelled_rows_equal_one_file_of_both(tmp_path: Path, keep_open: bool) -> None:
    """With `--keep-open`, a batch that one file leaves unfilled is filled by the next."""
    rows = [f"{1000 * row + T},r{row},{row % 3 // 2},a{row % 7},{row / 8}" for row in range(1000)]
    for name, part in (("whole", rows), ("first", rows[:401]), ("second", rows[401:])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["time,id,label,app,price", *part]))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed("run", "--source", tmp_path / "whole.csv", "--state", whole, *COMMAND, *LABELLED)
    state = ["--state", parts, *COMMAND, *LABELLED]
    kept = ["--keep-open"] if keep_open else []
    succeed("run", "--source", tmp_path / "first.csv", *kept, *state)
    succeed("run", "--source", tmp_path / "second.csv", *state)
    ours, theirs = taken(parts), taken(whole)
    assert ours.ledger == theirs.ledger
    assert ours.ledger[0] == 1000
    assert joined(parts) == joined(whole)
    assert (ours.weights_sha256 == theirs.weights_sha256) == keep_open


# -- the commands --------------------------------------------------------------------------------


def test_a_log_whose_windows_are_all_open_has_published_nothing_and_is_no_failure(
    records: pa.LargeBinaryArray, history: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_bytes(b"".join(value + b"\n" for value in records[:200].to_pylist()))
    state = ["--state", tmp_path / "state", *COMMAND]
    done = succeed("run", "--source", short, "--keep-open", *state)
    line = next(line for line in done.output.splitlines() if line.startswith("final:"))
    assert re.match(
        r"final: 0 examples; 198 impressions wait for the input that follows; "
        r"nothing is published yet; snapshot ",
        line,
    )
    assert not (tmp_path / "state" / "latest.json").exists()
    closed = command("run", "--source", short, *state)
    assert "resumed from snapshot" in closed.output
    assert last_report(tmp_path / "state")["examples"] > 0


def test_two_logs_in_one_command_equal_one_log_of_both(
    records: pa.LargeBinaryArray, history: Path, tmp_path: Path
) -> None:
    later = tmp_path / "later.jsonl"
    later.write_bytes(b"".join(value + b"\n" for value in records[HISTORY:].to_pylist()))
    both = ["--source", history / "history.jsonl", "--source", later]
    for name, sources in (("one", ["--source", history / "whole.jsonl"]), ("two", both)):
        own = ["--state", tmp_path / name, "--predictions", tmp_path / f"{name}-rows"]
        succeed("run", *sources, *own, *COMMAND)
    assert_went_on_as_one(tmp_path / "two", tmp_path / "one")
    rows = [pa.parquet.read_table(tmp_path / f"{name}-rows") for name in ("one", "two")]
    assert len(rows[0]) == 2000
    assert rows[0].equals(rows[1])


def test_the_predictions_of_each_example_are_written_once_though_runs_end_at_the_seam(
    records: pa.LargeBinaryArray, tmp_path: Path
) -> None:
    predictions = tmp_path / "rows"
    for log in (logs := cuts(records, [300, 900])):
        learn(
            tmp_path / "state",
            [log],
            keep_open=log is not logs[-1],
            predictions=predictions,
            **OFTEN,
        )
    parts = sorted(path.stem.split("-")[1:] for path in predictions.glob("*.parquet"))
    assert [first for first, _ in parts] == ["000000000000", *(end for _, end in parts[:-1])]
    assert int(parts[-1][1]) == 2000


def test_logs_and_a_topic_in_one_command_are_refused_with_the_two_commands(tmp_path: Path) -> None:
    done = command(
        "run", "--source", "a b.csv", "--source", "c.csv", "--topic", "clicks", "--state", tmp_path
    )
    assert done.exit_code == 2
    assert f"run --source 'a b.csv' --source c.csv --keep-open --state {tmp_path}" in done.output
    assert f"run --topic clicks --state {tmp_path}" in done.output
    assert not list(tmp_path.iterdir())


def test_a_log_that_another_must_precede_is_refused_with_what_to_do(
    history: Path, records: pa.LargeBinaryArray, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    learn(state, [Cut("history.jsonl#0", records[:900], dies_at=None)], keep_open=True, **OFTEN)
    path = snapshot.newest(state / "snapshots")
    assert path
    edit_manifest(path, lambda document: document["inputs"][0].update(ended=False))
    done = command("run", "--source", history / "whole.jsonl", "--state", state)
    assert done.exit_code == 3
    assert "history.jsonl was not read to its end" in done.output
    assert "with --source history.jsonl" in done.output
