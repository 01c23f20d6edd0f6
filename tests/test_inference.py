"""The first records of a source, and what a run infers from them and keeps."""

from __future__ import annotations

import itertools
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import command, succeed
from support.event_records import features, record
from support.lineage import QUICK, reports
from support.long import only_long
from support.reliability import Outcome
from support.trainers import Partitions

from stream_ctr import Scorer
from stream_ctr.cli import inference, runs
from stream_ctr.cli.inference import FirstRecords, first_records
from stream_ctr.connectors.records import Records
from stream_ctr.events.arrow_events import pack
from stream_ctr.events.features import Hasher
from stream_ctr.events.field import Field
from stream_ctr.events.fit import fit_numbers
from stream_ctr.events.infer import infer_fields
from stream_ctr.logs.simulate import Simulation
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest

CLICK = record(kind="click", features=...)


def values_of(*records: bytes) -> pa.LargeBinaryArray:
    return pa.array(records, pa.large_binary())


def newest(state: Path) -> Manifest:
    found = snapshot.newest(state / "snapshots")
    assert found
    return snapshot.read_manifest(found)


def first_of(source: Any, **options: Any) -> FirstRecords:
    found = first_records(
        source,
        **{
            "stopped": lambda: False,
            "say": lambda text: None,
            "max_record_bytes": 1 << 20,
            "reason": "",
            **options,
        },
    )
    assert found
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_first_records_do_not_depend_on_how_they_are_polled(seed: int) -> None:
    ends = [3000, 120, 900, 0]
    partitions = [
        values_of(*[CLICK] * (7 * p), *(features(n=n, p=p) for n in range(end)))
        for p, end in enumerate(ends)
    ]
    source = Partitions(partitions, seed=seed)
    first = first_of(source)
    expected = [
        features(n=n, p=p) for p, end in enumerate(ends) for n in range(min(end, 1000 // 4))
    ]
    assert first.values.to_pylist() == expected
    assert source.positions() == {0: 0, 1: 0, 2: 0, 3: 0}


def test_first_records_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_BYTES", 1 << 16)
    source = Partitions([values_of(*[features(text="x" * 1000)] * 900)])
    sizes = [len(value) for value in first_of(source).values.to_pylist()]
    assert sum(sizes[:-1]) < 1 << 16 <= sum(sizes)


def test_a_partition_of_clicks_does_not_keep_a_run_waiting() -> None:
    source = Partitions([values_of(*[features()] * 2000), values_of(*[CLICK] * 50_000)])
    first = first_of(source)
    assert len(first.values) == 500
    assert first.read < 10_000


def test_as_many_impressions_are_taken_whether_a_record_holds_one_or_many() -> None:
    alone = values_of(*[features(n=n) if n % 2 else CLICK for n in range(1, 4000)])
    packed = pack(alone, events_a_record=300)
    parts = [first_of(Partitions([values])).parts for values in (alone, packed)]
    assert [len(part) for (part,) in parts] == [1999, 7]
    fitted = [
        fit_numbers(part, [Field("n", "numeric")], numeric_encoding="value") for part in parts
    ]
    assert fitted[0] == fitted[1]


def test_a_live_source_is_waited_for_until_it_has_impressions() -> None:
    said: list[str] = []

    class Live(Partitions):
        until_end = False
        finished = False

        def caught_up(self) -> np.ndarray:
            return np.array([True])

        quiet = 3

        def poll(self, timeout_seconds: float) -> Any:
            self.quiet -= 1
            return Partitions([values_of()]).poll(0) if self.quiet > 0 else super().poll(0)

    source = Live([values_of(*[features()] * 1000)])
    first = first_of(source, say=said.append, reason="for a test")
    assert len(first.values) == 1000
    assert said == ["waiting for the first impressions, for a test"]
    stopped: Any = Live([values_of()])
    assert (
        first_records(
            stopped,
            stopped=lambda: True,
            say=said.append,
            max_record_bytes=1,
            reason="",
        )
        is None
    )


class Topic(Partitions):
    """A live topic that holds all of its records, polled at any times in any sizes."""

    until_end = False
    finished = False

    def __init__(self, values: Any, *, sizes: Any, gaps: Any) -> None:
        super().__init__(values)
        self._sizes = sizes
        self._gaps = gaps
        self.now = 0.0

    def silent_seconds(self) -> float:
        return 0.0

    def poll(self, timeout_seconds: float) -> Any:
        self.now += next(self._gaps)
        rows = []
        for p, values in enumerate(self._values):
            if p not in self._paused:
                n = min(next(self._sizes), len(values) - self._at[p])
                rows += [(p, self._at[p] + row, values[self._at[p] + row]) for row in range(n)]
                self._at[p] += n
        return Records(
            np.array([p for p, _, _ in rows], np.int32),
            np.array([offset for _, offset, _ in rows], np.int64),
            np.full(len(rows), -1),
            pa.array([value for _, _, value in rows], pa.large_binary()),
        )


def impression_at(seconds: float, **fields: Any) -> bytes:
    return record(time=1_735_689_600_000 + int(seconds * 1000), features=fields)


def click_at(seconds: float) -> bytes:
    return record(kind="click", time=1_735_689_600_000 + int(seconds * 1000), features=...)


def first_of_topic(
    values: Any, *, sizes: Any, gaps: Any, said: list[str] | None = None
) -> list[list[bytes]]:
    topic = Topic(values, sizes=sizes, gaps=gaps)
    first = first_of(
        topic,
        label_window_ms=60_000,
        clock=lambda: topic.now,
        say=(said if said is not None else []).append,
    )
    assert not topic._paused
    assert set(topic.positions().values()) == {0}
    return [part.to_pylist() for part in first.parts]


FULL = [impression_at(0, n=n) for n in range(600)]
SLOW = [impression_at(n, n=n) for n in range(90)]  # a label window after 60 of them
CLICKS_FIRST = [click_at(n / 100) for n in range(300)] + [impression_at(n, n=n) for n in range(90)]
LATE_IMPRESSION = [click_at(0), click_at(61), *FULL]
MANY_CLICKS = [click_at(0)] * 1333 + FULL  # of four partitions, 1000 records are searched


@pytest.mark.slow
@settings(max_examples=10)
@given(seed=st.integers(0, 1 << 32), largest=st.integers(40, 400), many=st.booleans())
def test_the_first_records_of_a_live_topic_are_a_function_of_its_log(
    seed: int, largest: int, many: bool
) -> None:
    values = [
        values_of(*log)
        for log in (FULL, SLOW, CLICKS_FIRST, MANY_CLICKS if many else LATE_IMPRESSION)
    ]
    rng = np.random.default_rng(seed)
    sizes = iter(lambda: int(rng.integers(0, largest + 1)), None)
    gaps = iter(lambda: float(rng.choice([0.0, 0.3, 25.0, 400.0])), None)
    parts = first_of_topic(values, sizes=sizes, gaps=gaps)
    assert parts == [FULL[:250], SLOW[:61], CLICKS_FIRST[300:361], []]


def test_a_partition_without_a_record_is_passed_over_after_ten_seconds() -> None:
    said: list[str] = []
    values = [values_of(*FULL), values_of(), values_of(*SLOW[:40])]
    parts = first_of_topic(
        values, sizes=itertools.repeat(1000), gaps=itertools.repeat(1.0), said=said
    )
    assert parts == [FULL[:333], [], SLOW[:40]]
    assert said[-2:] == [
        "note: clicks:1 brought no record within 10 s and is passed over",
        "note: clicks:2 brought fewer impressions and has been idle for 30 s (join.idle_timeout)",
    ]
    waited_for = [line.rpartition("not yet complete: ")[2] for line in said[:-2]]
    assert waited_for == ["clicks:1, clicks:2", "clicks:2", "clicks:2"]


def test_a_run_waits_for_as_long_as_no_partition_has_its_part() -> None:
    said: list[str] = []
    topic: Any = Topic(
        [values_of(*SLOW[:40]), values_of()],
        sizes=itertools.repeat(1000),
        gaps=itertools.repeat(1.0),
    )
    stopped = first_records(
        topic,
        stopped=lambda: topic.now > 500,
        say=said.append,
        max_record_bytes=1 << 20,
        reason="for a test",
        label_window_ms=60_000,
        clock=lambda: topic.now,
    )
    assert stopped is None
    assert said[0] == (
        "waiting for 500 impressions of each partition, or for a label window of event time, "
        "for a test: 40 so far; not yet complete: clicks:0, clicks:1"
    )


@pytest.mark.slow
def test_the_search_for_an_impression_goes_on_where_the_first_records_have_none() -> None:
    clicks = [click_at(n) for n in range(3000)]
    values = [values_of(*clicks, *FULL), values_of(*clicks)]
    for polled in (170, 1000):
        parts = first_of_topic(values, sizes=itertools.repeat(polled), gaps=itertools.repeat(0.1))
        assert parts == [FULL[:500], []]


# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a log whose clicks depend on a number between 0 and 1 alone."""
    path = tmp_path_factory.mktemp("shares") / "shares.jsonl"
    rng = np.random.default_rng(0)
    lines = []
    for batch in Simulation(3000, seed=5).batches():
        lines += [json.loads(value) for value in batch.value.to_pylist()]
    share = {
        event["impression_id"]: round(float(rng.random()), 4)
        for event in lines
        if event["kind"] == "impression"
    }
    kept = []
    for event in lines:
        if event["kind"] == "impression":
            event["features"] = {"share": share[event["impression_id"]], "age": 31}
            event.pop("true_probability", None)
            kept.append(event)
            if rng.random() < (0.6 if 0.45 < event["features"]["share"] < 0.6 else 0.05):
                kept.append(
                    {
                        "kind": "click",
                        "impression_id": event["impression_id"],
                        "time": event["time"],
                    }
                )
    path.write_text("".join(json.dumps(event) + "\n" for event in kept))
    return path


@pytest.mark.bad_input(
    "one text among the first numbers of a field", via="a log in polls of any size"
)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("at", "kind"), [(499, "categorical"), (500, "numeric")])
def test_a_text_among_the_first_thousand_numbers_decides_however_it_is_polled(
    at: int, kind: Literal["categorical", "numeric"], seed: int, outcome: Outcome
) -> None:
    lines = [[features(n=n) for n in range(900)] for _ in range(2)]
    lines[1][at] = features(n="n/a")
    first = first_of(Partitions([values_of(*part) for part in lines], seed=seed))
    assert Field("n", kind) in infer_fields(first.values)
    outcome("the first 500 impressions of each of two partitions decide the kind of the field")


@pytest.mark.parametrize("seed", [0, 1, *only_long([2, 3])])
@pytest.mark.parametrize("clicks", [7999, 8000])
def test_the_search_for_an_impression_ends_at_the_same_record_however_it_is_polled(
    clicks: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_MOST_RECORDS", 5000)
    values = values_of(*[CLICK] * clicks, *FULL)
    source = Partitions([values], seed=seed, largest=10_000)
    assert first_of(source).found == (clicks < 8000)


def test_a_new_run_writes_its_features_where_a_person_can_read_and_use_them(
    shares: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    succeed("run", "--source", shares, "--state", state, *QUICK)
    file = state / "features.toml"
    text = file.read_text()
    assert tomllib.loads(text)["features"] == {
        "categorical": [],
        "numeric": ["age", "share"],
        "numeric_encoding": "buckets",
        "buckets_per_octave": 2.0,
        "hash_seed": 0,
    }
    assert "inferred from its first impressions" in text
    assert "#   edges of the buckets of share: " in text
    # A copy of it begins the same run.
    again = tmp_path / "again"
    succeed("run", "--source", shares, "--state", again, *QUICK, "--config", file)
    assert newest(again).weights_sha256 == newest(state).weights_sha256
    assert "as it was told to use them" in (again / "features.toml").read_text()
    # A resumed run leaves it as it is.
    file.write_text("mine")
    succeed("run", "--source", shares, "--state", state, *QUICK)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("named", [(), ("-X", "features.numeric=share,age")])
def test_numbers_between_0_and_1_are_learned_with_the_defaults(
    shares: Path, tmp_path: Path, named: tuple[str, ...]
) -> None:
    state = tmp_path / "state"
    result = succeed("run", "--source", shares, "--state", state, *QUICK, *named)
    assert "note: buckets fitted to the numbers of share\n" in result.stderr
    assert reports(state)[-1]["models"]["ftrl"]["auc"] > 0.75
    schema = newest(state).schema
    assert {name: len(edges) for name, edges in schema.bucket_edges.items()} == {"share": 15}
    unfitted = tmp_path / "unfitted"
    off = ("-X", "features.fit_numbers=false")
    succeed("run", "--source", shares, "--state", unfitted, *QUICK, *named, *off)
    assert newest(unfitted).schema.bucket_edges == {}
    assert reports(unfitted)[-1]["models"]["ftrl"]["auc"] < 0.65


def test_a_resumed_run_and_a_server_have_the_fit_of_the_snapshot(
    shares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    lines = shares.read_text().splitlines(keepends=True)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(lines[:2000]))
    succeed("run", "--source", log, "--state", state, *QUICK)
    edges = newest(state).schema.bucket_edges
    log.write_text("".join(lines))
    monkeypatch.setattr(runs, "fit_numbers", None)  # nothing is fitted again
    result = succeed("run", "--source", log, "--state", state, *QUICK)
    assert "resumed" in result.stderr
    assert "fitted" not in result.stderr
    assert newest(state).schema.bucket_edges == edges
    scorer = Scorer(state / "snapshots" / newest(state).snapshot)
    hasher = Hasher([Field("share", "numeric")], table_bits=14, bucket_edges=edges)
    row = [scorer.fields.index(Field("share", "numeric"))]
    columns = {"share": pa.array([0.5]), "age": pa.array([31.0])}
    assert scorer.hasher.rows(columns)[0][:, row].tolist() == hasher.rows(columns)[0].tolist()
    off = ("-X", "features.fit_numbers=false")
    refused = command("run", "--source", log, "--state", state, *QUICK, *off)
    assert refused.exit_code == 3
    assert "was made with bucket_edges" in refused.output


@pytest.mark.parametrize("encoding", ["value", "log_value"])
def test_the_value_encodings_survive_large_numbers_with_the_defaults(
    tmp_path: Path, encoding: str
) -> None:
    events = [
        json.loads(value)
        for batch in Simulation(3000, seed=5).batches()
        for value in batch.value.to_pylist()
    ]
    rng = np.random.default_rng(0)
    for event in events:
        if event["kind"] == "impression":
            event["features"]["large"] = float(rng.lognormal(8, 3))
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    state = tmp_path / "state"
    chosen = ("-X", f"features.numeric_encoding={encoding}")
    succeed("run", "--source", log, "--state", state, *QUICK, *chosen)
    final = reports(state)[-1]
    for model in ("deepfm", "ftrl"):
        assert final["last_half"][model]["logloss"] < 1.1 * final["last_half"]["constant_logloss"]
    assert newest(state).schema.value_scales["large"] > (1000 if encoding == "value" else 5)
