"""Runs from Python do what the command does, and hand their reports to the program."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.lineage import fingerprint
from support.patience import PATIENCE_SECONDS
from support.topics import produced
from support.trainers import SMALL, Partitions, split, stream

import stream_ctr
from stream_ctr import Report, Scorer, Simulation, StopRequest, Subscriber, config, reports, run
from stream_ctr.errors import ConfigError, DataError, StreamCtrError
from stream_ctr.logs.log import Log
from stream_ctr.snapshots import snapshot

__all__ = ["stream"]  # a fixture

SECTIONS: Mapping[str, Any] = {**SMALL, "metrics": {"window": "60s", "topic": "metrics"}}


def newest(state: Path) -> Path:
    found = snapshot.newest(state / "snapshots")
    assert found
    return found


class SentTo:
    """A sink that keeps what it gets; without a connection it takes nothing."""

    def __init__(self, *, connected: bool = True) -> None:
        self.connected = connected
        self.sent: list[tuple[str, bytes]] = []

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
        time: int | None = None,
    ) -> None:
        if not self.connected:
            raise ConnectionError("no route")
        self.sent.append((topic, value))

    def flush(self, timeout_seconds: float) -> None:
        if not self.connected:
            raise ConnectionError("no route")


def test_a_log_is_learned_reported_published_and_served(tmp_path: Path) -> None:
    state = tmp_path / "state"
    given: list[Report] = []
    last = run(SECTIONS, source=Simulation(3000, seed=1), state=state, on_report=given.append)
    assert last
    assert (last.kind, last.examples) == ("final", 3000)
    assert given[-1] == last
    table = reports(state)
    assert table["examples"].to_pylist()[-1] == 3000
    assert {"deepfm", "ftrl"} <= set(table["model"].to_pylist())
    model = Subscriber(state)
    assert model.next(0.0)
    assert 0 < model.predict({"app_id": "a1"}) < 1
    assert Scorer(newest(state)).predict([{"app_id": "a1"}]).shape == (1,)


def test_the_path_of_a_log_and_of_a_configuration_will_do(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    Simulation(1000, seed=2).write_jsonl(log)
    (tmp_path / "my.toml").write_text(
        '[model]\nname = "fm"\nembedding_dim = 4\ntable_bits = 12\n'
        "[learn]\nbatch_size = 128\n[baseline]\nenabled = false\n"
    )
    run(str(tmp_path / "my.toml"), source=str(log), state=tmp_path / "path")
    loaded = config.load(tmp_path / "my.toml", environ={})
    run(loaded, source=stream_ctr.open_log(log), state=tmp_path / "object")
    one, other = (fingerprint(newest(tmp_path / name)) for name in ("path", "object"))
    assert one.weights_sha256 == other.weights_sha256
    assert one.examples == 1000


def test_a_directory_is_resumed_with_the_configuration_that_it_keeps(tmp_path: Path) -> None:
    log = Simulation(1000, seed=1)
    run(SECTIONS, source=log, state=tmp_path)
    last = run(source=log, state=tmp_path)
    assert last
    assert last.examples == 1000
    with pytest.raises(ConfigError, match="was made with embedding_dim = 4, not 8"):
        run({"model": {"embedding_dim": 8}}, source=log, state=tmp_path)


def test_a_new_directory_begins_with_the_weights_of_another_run(tmp_path: Path) -> None:
    first, then = Simulation(1500, seed=1), Simulation(1000, seed=2)
    run(SECTIONS, source=first, state=tmp_path / "first")
    last = run(
        {"learn": {"batch_size": 64}},
        source=then,
        state=tmp_path / "then",
        begin_from=tmp_path / "first",
    )
    assert last
    assert last.examples == 1000
    kept = snapshot.verify(newest(tmp_path / "then"))
    assert kept.origin
    assert kept.origin.examples == 1500
    assert kept.config["learn"]["batch_size"] == 64
    assert kept.config["model"]["embedding_dim"] == 4
    with pytest.raises(ConfigError, match="another origin"):
        run(source=then, state=tmp_path / "then", begin_from=tmp_path / "other")


def test_a_run_replaces_the_one_that_it_is_told_to(
    embedded_broker: str, topic: str, tmp_path: Path
) -> None:
    produced(embedded_broker, topic, slice(0, 1500))
    own = {
        "input": {"topic": topic, "bootstrap_servers": embedded_broker},
        "snapshots": {"topic": f"{topic}.snapshots"},
        "metrics": {"topic": ""},
    }
    sections = {**SECTIONS, **own}
    first = run(sections, state=tmp_path / "first", until_end=True)
    assert first
    with pytest.raises(StreamCtrError, match=first.run):
        run(sections, state=tmp_path / "second", until_end=True)
    second = run(sections, state=tmp_path / "second", until_end=True, replace_run=first.run)
    assert second
    assert second.examples == first.examples
    with stream_ctr.topic_pointers(sections) as pointers, Subscriber(pointers) as model:
        assert model.wait(PATIENCE_SECONDS)
        assert model.pointer
        assert model.pointer.run == second.run


@pytest.mark.parametrize(
    ("replace_run", "problem"), [("7", "id of a run"), ("0" * 32, "a source has none")]
)
def test_a_run_that_cannot_be_replaced_is_an_error(
    replace_run: str, problem: str, tmp_path: Path
) -> None:
    source = None if problem == "id of a run" else Simulation(10)
    with pytest.raises(ConfigError, match=problem):
        run(SECTIONS, source=source, state=tmp_path / "state", replace_run=replace_run)
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
def test_a_source_of_ones_own_is_read_like_any_other(tmp_path: Path, stream: Any) -> None:
    parts = split(stream, 2)
    source: Any = Partitions(parts, seed=1)
    last = run(SECTIONS, source=source, state=tmp_path / "own")
    assert last
    assert last.examples == 6000
    assert snapshot.verify(newest(tmp_path / "own")).positions == {
        "clicks:0": len(parts[0]),
        "clicks:1": len(parts[1]),
    }


def test_a_sink_gets_what_goes_to_topics_on_kafka(tmp_path: Path) -> None:
    sink = SentTo()
    run(SECTIONS, source=Simulation(1000, seed=1), state=tmp_path, sink=sink)
    assert {topic for topic, _ in sink.sent} == {"metrics", "stream-ctr.snapshots"}
    kinds = [json.loads(value)["kind"] for topic, value in sink.sent if topic == "metrics"]
    assert kinds[-1] == "final"
    assert set(kinds) == {"window", "final"}


def test_a_sink_that_cannot_be_reached_does_not_stop_the_run(tmp_path: Path) -> None:
    sink = SentTo(connected=False)
    with pytest.raises(stream_ctr.errors.BrokerError, match="stream-ctr.snapshots"):
        run(SECTIONS, source=Simulation(1000, seed=1), state=tmp_path, sink=sink)
    assert snapshot.verify(newest(tmp_path)).examples == 1000


@pytest.mark.slow
def test_a_run_in_a_thread_ends_with_a_snapshot_when_it_is_stopped(
    tmp_path: Path, stream: Any
) -> None:
    class Endless(Partitions):
        until_end = False
        finished = False

    stop = StopRequest()
    sections = {**SECTIONS, "schedule": {"report_every": "20ms"}}
    found: list[Report | None] = []

    def learn() -> None:
        source: Any = Endless(split(stream, 1))
        # Called in the thread that learns, at the first report.
        found.append(
            run(sections, source=source, state=tmp_path, stop=stop, on_report=lambda report: stop())
        )

    thread = threading.Thread(target=learn)
    thread.start()
    thread.join()
    assert found[0]
    assert found[0].kind == "stopped"
    assert newest(tmp_path)


def test_what_cannot_be_done_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'modle'; did you mean 'model'"):
        run({"modle": {}}, source=Simulation(10, seed=1), state=tmp_path)
    with pytest.raises(ConfigError, match="a sink is for a source"):
        run(state=tmp_path, sink=SentTo())
    with pytest.raises(DataError, match="absent.jsonl"):
        run(source=tmp_path / "absent.jsonl", state=tmp_path)


def test_a_log_is_what_the_type_says() -> None:
    assert issubclass(Simulation, Log)


def test_every_name_is_offered_and_none_is_loaded_before_it_is_used() -> None:
    code = (
        "import sys, stream_ctr;"
        "heavy = {'torch', 'numpy', 'pyarrow', 'pydantic', 'stream_ctr.config'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dir(stream_ctr) == sorted(stream_ctr.__all__)
    assert all(hasattr(stream_ctr, name) for name in stream_ctr.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = stream_ctr.absent
