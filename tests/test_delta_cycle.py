"""Base and deltas give the next snapshot bit for bit, whatever happens to the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from click.testing import CliRunner
from support import forks
from support.delta_chains import (
    Link,
    apply,
    assert_chains_hold,
    digest_of,
    links,
    plain_weights,
)
from support.lineage import SMALL as SMALL_OPTIONS
from support.lineage import last_report
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome
from support.trainers import (
    RIVER,
    SMALL,
    Partitions,
    Sections,
    assert_equal_states,
    finish,
    trainer,
)

from stream_ctr.cli.main import main
from stream_ctr.connectors import Records, kafka
from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.gate import Verdict
from stream_ctr.failpoint import EXIT_CODE, VARIABLE
from stream_ctr.logs.simulate import Simulation
from stream_ctr.models import MODELS
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.delta_sources import TopicDeltas
from stream_ctr.snapshots.pointer import read_pointer
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.train.trainer import Surroundings, Trainer

OFTEN: Sections = {
    "schedule": {"snapshot_examples": 1000},
    "snapshots": {"keep": 50, "delta_every": "1s"},
}
BLEND: Sections = {
    "model": {**SMALL["model"], "name": "blend"},
    "learn": {"batch_size": 512, "threads": 2},
}


class EveryThird:
    """Raise the flag of deltas each third time that it is asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def due(self, name: str) -> bool:
        self.asked += name == "delta"
        return name == "delta" and self.asked % 3 == 0


class Steered(Partitions):
    """A log of one partition that calls `at` with the number of records before each poll.

    Deltas and snapshots that are being written are finished first, so that tests do not depend on
    the speed of the disk.
    """

    at: Callable[[int], object] = staticmethod(lambda read: None)

    def poll(self, timeout_seconds: float) -> Records:
        if self.trainer:
            self.trainer._settle(wait=True)
        self.at(self._at[0])
        return super().poll(timeout_seconds)


def with_deltas(directory: Path, source: Any, **sections: Any) -> Trainer:
    """Build a trainer that takes a delta about every third batch."""
    around = Surroundings(flags=EveryThird())
    return trainer(directory, source, surroundings=around, **{**OFTEN, **sections})


class Stretch:
    """The stretch of a log from the first deltas on, `records` long."""

    def __init__(self, built: Trainer, records: int) -> None:
        self._counters = built.state.counters
        self._records = records
        self._first: int | None = None

    def begun(self, read: int) -> bool:
        """Return whether it has begun, and is now `read` records into the log."""
        if self._first is None and self._counters["deltas_written"] >= 2:
            self._first = read
        return self._first is not None

    def holds(self, read: int) -> bool:
        return self.begun(read) and read < (self._first or 0) + self._records


def snapshots_of(state: Path) -> list[Path]:
    root = state / "snapshots"
    return [root / name for name in snapshot.snapshot_ids(root)]


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory, stream: pa.LargeBinaryArray) -> Any:
    """A run of the default blend with deltas: its directory and its last report."""
    directory = tmp_path_factory.mktemp("blended")
    return directory, finish(with_deltas(directory, Partitions([stream]), **BLEND))


@pytest.mark.slow
def test_base_and_deltas_of_a_blend_give_each_next_snapshot_bit_for_bit(blended: Any) -> None:
    directory, report = blended
    assert assert_chains_hold(directory) >= 4
    found = links(directory)
    assert report["deltas"]["written"] == len(found) > 8
    manifests = [snapshot.read_manifest(path) for path in snapshots_of(directory)]
    assert manifests[0].delta is None
    assert all(manifest.delta for manifest in manifests[1:])
    assert manifests[-1].delta == found[-1].position  # the last cut has the last delta
    pointer = read_pointer(directory / "latest.json")
    assert pointer
    assert pointer.delta == found[-1].position
    assert set(found[0].header.rows) == {
        f"{name}.model"
        for name in ("deepfm", "ftrl", "ftrl_scaled", "ftrl_pairs", "ftrl_pairs_slow")
    }


def test_a_header_says_what_is_new_in_its_delta(blended: Any) -> None:
    directory, report = blended
    base, *_ = [snapshot.read_manifest(path) for path in snapshots_of(directory)]
    found = [link.header for link in links(directory)]
    assert {(header.base, header.base_sha256) for header in found} == {
        (base.snapshot, digest_of(snapshots_of(directory)[0]))
    }
    assert [header.rank.sequence for header in found] == list(range(1, len(found) + 1))
    before = base.examples
    for header in found:
        assert sum(closed.examples for closed in header.closed) == header.examples - before
        assert len(header.closed) <= 64
        assert all(closed.at_ms <= header.learned_ms for closed in header.closed)
        assert header.learned_ms <= header.created_ms
        assert header.oldest_event_ms <= header.newest_event_ms < header.watermark_ms
        assert bool(header.newest_event_ms) == (header.examples > before)
        before = header.examples
    assert found[-1].examples == report["examples"]
    assert found[-1].positions == {"clicks:0": report["counters"]["records"]}
    figures = report["deltas"]
    assert figures["rows"] == sum(sum(header.rows.values()) for header in found)
    assert figures["bytes"] == sum(header.payload_bytes for header in found)
    assert figures["base"] == base.snapshot


def test_the_ages_of_all_examples_are_in_the_last_report(blended: Any) -> None:
    _, report = blended
    ages = report["freshness"]
    assert set(ages) == {
        "event_to_closed",
        "closed_to_learned",
        "closed_to_published",
        "event_to_published",
    }
    for stage in ages.values():
        assert stage["examples"] == report["examples"]
        assert 0 <= stage["p50"] <= stage["p90"] <= stage["p99"]


@pytest.mark.slow
def test_deltas_change_nothing_that_is_learned(
    blended: Any, tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    directory, report = blended
    without = {"snapshots": {"keep": 50}}
    plain = finish(trainer(tmp_path, Partitions([stream]), **{**OFTEN, **without}, **BLEND))
    assert_equal_states(directory, tmp_path)
    for name in ("ledger", "models", "examples", "as_served", "pairs"):
        assert report[name] == plain[name], name
    assert "deltas" not in plain
    assert plain["freshness"]["event_to_published"]["examples"] == plain["examples"]
    assert not (tmp_path / "deltas").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_same_holds_for_each_system(
    tmp_path: Path, stream: pa.LargeBinaryArray, name: str
) -> None:
    own = {**SMALL["model"], "name": name, "pretrain_examples": 700}
    sections = {
        "schedule": {"snapshot_examples": 400},
        "snapshots": {**OFTEN["snapshots"], "gate_clicks": 0},  # FNN changes its phase meanwhile
        "model": own,
        "ftrl": {"enabled": False},
    }
    online = {} if name in ("fnn", "lr") else {"learn": {"batch_size": 128, "threads": 1}}
    source = Steered([stream.slice(0, 1600)])
    finish(with_deltas(tmp_path, source, **sections, **online))
    assert assert_chains_hold(tmp_path) >= 1
    assert len(links(tmp_path)) >= 2


def test_deltas_of_fnn_wait_for_a_verdict_on_the_network_that_took_over(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    own = {**SMALL["model"], "name": "fnn", "pretrain_examples": 2000}
    report = finish(with_deltas(tmp_path, Steered([stream.slice(0, 4000)]), model=own))
    assert report["counters"]["deltas_refused"] >= 2
    written = [link.header.examples for link in links(tmp_path)]
    assert written
    assert max(written) < 2048  # 16 batches of 128 end the pre-training
    assert_chains_hold(tmp_path)


@pytest.mark.slow
def test_additional_models_are_in_deltas_too(tmp_path: Path, stream: pa.LargeBinaryArray) -> None:
    several = {
        **SMALL["model"],
        "name": "deepfm",
        "beside": ("fnn", "lr"),
        "pretrain_examples": 2500,
    }
    report = finish(with_deltas(tmp_path, Steered([stream]), model=several, **RIVER))
    assert assert_chains_hold(tmp_path) >= 4
    assert set(links(tmp_path)[0].header.rows) == {"model", "fnn.model", "lr.model"}
    assert report["deltas"]["failed"] == 0


@pytest.mark.slow
def test_bfloat16_is_within_its_rounding_and_takes_half_of_the_bytes(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    short = stream.slice(0, 3500)
    for precision in ("fp32", "bf16"):
        snapshots = {**OFTEN["snapshots"], "delta_precision": precision}
        finish(with_deltas(tmp_path / precision, Steered([short]), snapshots=snapshots))
    exact, rounded = (links(tmp_path / name) for name in ("fp32", "bf16"))
    assert [_bytes_of_a_value(link) for link in exact] == [4.0] * len(exact)
    assert [_bytes_of_a_value(link) for link in rounded] == [2.0] * len(rounded)
    base, *_, last = snapshots_of(tmp_path / "bf16")
    _, plain = plain_weights(base)
    for link in rounded:
        apply(plain, link)
    manifest, expected = plain_weights(last)
    assert manifest.delta == rounded[-1].position
    for stem, named in expected.items():
        for name, array in named.items():
            bound = 2.0**-8 if name == "values" else 0
            assert np.allclose(plain[stem][name], array, rtol=bound, atol=0), (stem, name)
    assert not np.array_equal(plain["model"]["values"], expected["model"]["values"])


def _bytes_of_a_value(link: Any) -> float:
    tensors = safetensors.numpy.load(link.payload)
    return float(np.mean([a.itemsize for name, a in tensors.items() if name.endswith("/values")]))


# -- resuming --------------------------------------------------------------------------------------


def test_a_run_that_resumes_from_the_published_snapshot_begins_a_chain_on_it_at_once(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    finish(with_deltas(tmp_path, Steered([stream], stop_after=4000)))
    before = links(tmp_path)
    newest = snapshots_of(tmp_path)[-1]
    resumed = with_deltas(tmp_path, Steered([stream]))
    resumed.restore(newest)
    finish(resumed)
    after = links(tmp_path)[len(before) :]
    assert after[0].header.base == newest.name
    assert after[0].header.parent == digest_of(newest)
    assert after[0].header.rank.epoch > before[-1].header.rank.epoch
    assert assert_chains_hold(tmp_path) >= 4


def test_a_run_that_resumes_from_a_snapshot_that_an_operator_replaced_begins_no_chain_on_it(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    finish(with_deltas(tmp_path, Steered([stream], stop_after=4000)))
    first, *_, newest = snapshots_of(tmp_path)
    Publisher(tmp_path).roll_back(first, snapshot.verify(first))
    before = links(tmp_path)
    resumed = with_deltas(tmp_path, Steered([stream]))
    resumed.restore(newest)
    finish(resumed)
    bases = {link.header.base for link in links(tmp_path)[len(before) :]}
    assert bases
    assert not bases & {first.name, newest.name}
    assert_chains_hold(tmp_path)


# -- what ends a chain, and what does not ----------------------------------------------------------


def test_a_rollback_by_an_operator_ends_the_chain_and_the_next_snapshot_begins_another(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    source = Steered([stream])
    built = with_deltas(tmp_path, source)
    stretch = Stretch(built, 0)
    rolled_back: list[int] = []
    before: list[Link] = []

    def roll_back(read: int) -> None:
        if stretch.begun(read) and not rolled_back:
            first, *_ = snapshots_of(tmp_path)
            pointer = Publisher(tmp_path).roll_back(first, snapshot.verify(first))
            assert pointer.delta is None
            rolled_back.append(pointer.epoch)
            before.extend(links(tmp_path))

    source.at = roll_back
    finish(built)
    found = links(tmp_path)
    bases = list(dict.fromkeys(link.header.base for link in found))
    assert len(bases) == 2
    assert [link for link in found if link.header.base == bases[0]] == before
    for link in found:
        assert (link.header.rank.epoch >= rolled_back[0]) == (link.header.base == bases[1])
    latest = read_pointer(tmp_path / "latest.json")
    assert latest
    assert latest.epoch == rolled_back[0]
    assert assert_chains_hold(tmp_path) >= 2


def test_a_model_that_goes_back_ends_the_chain(tmp_path: Path, stream: pa.LargeBinaryArray) -> None:
    several = {**SMALL["model"], "name": "fm", "beside": ("deepfm", "lr")}
    source = Steered([stream])
    built = with_deltas(tmp_path, source, model=several)
    learner: Any = built.state.learners["deepfm"]
    stretch = Stretch(built, 0)
    spoiled: list[int] = []

    def spoil(read: int) -> None:
        if stretch.begun(read) and not spoiled:
            learner.table.rows.fill_(float("nan"))
            spoiled.append(read)

    source.at = spoil
    report = finish(built)
    assert report["counters"]["rollbacks.deepfm"] >= 1
    bases = list(dict.fromkeys(link.header.base for link in links(tmp_path)))
    assert len(bases) == 2
    assert assert_chains_hold(tmp_path) >= 2


def test_a_model_that_is_left_out_is_absent_from_then_on(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    several = {**SMALL["model"], "name": "fm", "beside": ("deepfm", "lr")}
    source = Steered([stream])
    frequent = {"schedule": {"snapshot_examples": 500}}
    built = with_deltas(tmp_path, source, model=several, **frequent)
    learner: Any = built.state.learners["deepfm"]
    stretch = Stretch(built, 0)

    def spoil(read: int) -> None:
        if stretch.begun(read):
            learner.table.rows.fill_(float("nan"))

    source.at = spoil
    report = finish(built)
    assert list(report["left_out"]) == ["deepfm"]
    found = links(tmp_path)
    assert set(found[0].header.rows) == {"model", "deepfm.model", "lr.model"}
    assert set(found[-1].header.rows) == {"model", "lr.model"}
    assert assert_chains_hold(tmp_path) >= 1


def test_a_delta_that_the_gate_refuses_leaves_its_rows_to_the_next_one(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    source = Steered([stream])
    built = with_deltas(tmp_path, source)
    judge = built.state.scoreboard.judge
    stretch = Stretch(built, 2000)
    source.at = lambda read: (
        judge.begin_anew("it is another model") if stretch.holds(read) else judge.go_back(Verdict())
    )
    report = finish(built)
    counters = report["counters"]
    assert counters["deltas_refused"] >= 2
    assert counters["publications_refused"] >= 1
    found = links(tmp_path)
    assert {link.header.base for link in found} == {snapshots_of(tmp_path)[0].name}
    jumps = np.diff([link.header.examples for link in found])
    assert max(jumps) > 1000  # one delta holds what was refused
    assert assert_chains_hold(tmp_path) >= 2
    assert report["freshness"]["closed_to_published"]["examples"] == report["examples"]


def test_a_last_step_that_did_harm_withholds_a_delta(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    built = with_deltas(tmp_path, Steered([stream.slice(0, 3000)]))
    built.state.check_published_step = lambda *, most: ("its last step",)  # type: ignore[method-assign]
    report = finish(built)
    assert report["counters"]["deltas_refused"] >= 2
    assert {link.position for link in links(tmp_path)} <= {
        snapshot.read_manifest(path).delta for path in snapshots_of(tmp_path)
    }
    assert_chains_hold(tmp_path)


def test_deltas_that_no_disk_takes_stop_neither_learning_nor_snapshots(
    tmp_path: Path, stream: pa.LargeBinaryArray, caplog: pytest.LogCaptureFixture
) -> None:
    source = Steered([stream])
    built = with_deltas(tmp_path, source)
    folder = tmp_path / "deltas"
    hidden = tmp_path / "hidden"
    stretch = Stretch(built, 1500)

    def obstruct(read: int) -> None:
        if stretch.holds(read) and folder.is_dir():
            folder.rename(hidden)
            folder.write_text("in the way")
        elif not stretch.holds(read) and hidden.exists():
            folder.unlink()
            hidden.rename(folder)

    source.at = obstruct
    report = finish(built)
    assert report["counters"]["deltas_failed"] >= 2
    assert "snapshots_failed" not in report["counters"]
    assert caplog.text.count("deltas are not written") == 1
    assert "chain of deltas ends: the delta of a snapshot could not be written" in caplog.text
    assert report["examples"] == 6000
    manifests = [snapshot.read_manifest(path) for path in snapshots_of(tmp_path)]
    assert [bool(manifest.delta) for manifest in manifests].count(
        False
    ) >= 2  # the first one, and at least one of the others
    assert len({link.header.base for link in links(tmp_path)}) == 2
    assert assert_chains_hold(tmp_path) >= 2


def test_an_outlet_gets_every_delta_in_order_also_after_it_failed(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    sent: list[str] = []
    calls: list[int] = []

    def outlet(header_bytes: bytes, header: Any, payload: bytes) -> None:
        calls.append(1)
        if 3 <= len(calls) <= 5:
            raise SnapshotError("the broker is away")
        sent.append(header.rank.name)

    report = finish(with_deltas(tmp_path, Steered([stream]), delta_outlets=[outlet]))
    assert sent == [link.header.rank.name for link in links(tmp_path)]
    assert report["deltas"]["unsent"] == 3


# -- kill -9 ---------------------------------------------------------------------------------------

OPTIONS = [
    *SMALL_OPTIONS,
    *("-X", "schedule.snapshot_examples=1024", "-X", "snapshots.keep=50"),
    *("-X", "baseline.enabled=false", "-X", "snapshots.delta_every=100ms"),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    Simulation(4000, seed=5).write_jsonl(path)
    return path


def command(log: Path, state: Path) -> list[str]:
    return ["run", "--source", str(log), "--state", str(state), "--until-end", *OPTIONS]


@pytest.fixture(scope="module")
def clean(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("clean") / "state"
    result = CliRunner().invoke(main, command(log, state))
    assert result.exit_code == 0, result.output
    assert assert_chains_hold(state) >= 2
    return state


@pytest.mark.fault(2, injected="death between the copy of a delta and the pointer")
@pytest.mark.slow
@pytest.mark.parametrize(
    "failpoint",
    [
        "delta.copied:2",
        "delta.payload:2",
        "delta.header:2",
        "delta.index:2",
        "snapshot.manifest:3",
        "pointer.before:3",
        "pointer.after:3",
    ],
)
def test_a_run_that_died_with_a_delta_on_its_way_goes_on_with_another_chain(
    log: Path, clean: Path, tmp_path: Path, failpoint: str, outcome: Outcome
) -> None:
    state = tmp_path / "state"
    environment = {**os.environ, VARIABLE: failpoint}
    died = forks.run(*command(log, state), env=environment, timeout=PATIENCE_SECONDS)
    assert died.returncode == EXIT_CODE, died.stderr
    assert_chains_hold(state)
    newest = snapshots_of(state)[-1]
    before = {link.sha256 for link in links(state)}
    result = CliRunner().invoke(main, command(log, state))
    assert result.exit_code == 0, result.output
    assert assert_chains_hold(state) >= 1
    ours, theirs = (plain_weights(snapshots_of(each)[-1]) for each in (state, clean))
    assert ours[0].serving_sha256 == theirs[0].serving_sha256
    assert last_report(state)["ledger"] == last_report(clean)["ledger"]
    following = [link for link in links(state) if link.sha256 not in before]
    assert following[0].header.base == newest.name
    assert not list((state / "deltas").glob("tmp-*"))
    outcome("every delta follows its parent, base and deltas give the next snapshot, weights equal")


@pytest.mark.slow
def test_a_run_on_kafka_sends_each_delta_to_the_topic_too(
    kafka_broker: str, topic: str, tmp_path: Path
) -> None:
    client = kafka.client_options(kafka_broker, {})
    kafka.ensure_topic(client, topic)
    sink = kafka.KafkaSink(client)
    for batch in Simulation(4000, seed=5).batches():
        sink.send_batch(topic, batch.value)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    names = {"metrics.topic": "metrics", "snapshots.topic": "snapshots"}
    names |= {"snapshots.delta_topic": "deltas"}
    own = [part for key, name in names.items() for part in ("-X", f"{key}={topic}.{name}")]
    run = ["run", "--topic", topic, "--bootstrap-servers", kafka_broker, "--until-end"]
    result = CliRunner().invoke(main, [*run, "--state", str(tmp_path), *OPTIONS, *own])
    assert result.exit_code == 0, result.output
    assert assert_chains_hold(tmp_path) >= 2
    found = links(tmp_path)
    source = TopicDeltas(kafka.RecordFollower(client, f"{topic}.deltas"), model_name="default")
    received: list[Any] = []
    while len(received) < len(found):
        received += source.poll(1.0)
    source.close()
    assert [delta.sha256 for delta in received] == [link.sha256 for link in found]
    assert [delta.payload for delta in received] == [link.payload for link in found]
    assert last_report(tmp_path)["deltas"]["unsent"] == 0
