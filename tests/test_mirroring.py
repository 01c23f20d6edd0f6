"""A run copies what it publishes to `snapshots.url`, and says so when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from support.commands import command, own_topics, read_records, succeed
from support.topics import produced

from stream_ctr.snapshots.base_topic import decode_label
from stream_ctr.snapshots.pointer import read_pointer
from stream_ctr.snapshots.scorer import Scorer

SMALL = [
    *("-X", "model.name=deepfm", "-X", "model.table_bits=10", "-X", "model.hidden=8"),
    *("-X", "learn.batch_size=64", "-X", "baseline.enabled=false"),
    *("-X", "join.label_window=60s", "-X", "snapshots.gate_clicks=0"),
]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    succeed("simulate", "--impressions", 3000, "--seed", 1, "--out", path)
    return path


def run(events: Path, state: Path, *options: object) -> Result:
    return command("run", "--source", events, "--state", state, *SMALL, *options)


@pytest.mark.slow
def test_a_run_leaves_a_mirror_that_serves(events: Path, tmp_path: Path) -> None:
    state, copy = tmp_path / "state", tmp_path / "copy"
    url = copy.as_uri()
    options = ["-X", f"snapshots.url={url}", "-X", "snapshots.delta_every=100ms"]
    options += ["-X", "schedule.snapshot_examples=1000"]
    result = run(events, state, *options)
    assert result.exit_code == 0, result.output
    pointer = read_pointer(state / "latest.json")
    assert pointer
    assert pointer == read_pointer(copy / "latest.json")
    assert pointer.url == url
    original, copied = (Scorer(each / "snapshots" / pointer.snapshot) for each in (state, copy))
    row = {"hour": "20"}
    assert copied.predict(row) == original.predict(row)
    assert not list(copy.rglob("optimizer*"))
    local, far = (
        sorted(each.name for each in (root / "deltas").glob("*")) for root in (state, copy)
    )
    assert local == far
    arguments = ("--cache", tmp_path / "cache", "--once", "--json", "--no-deltas")
    line = json.loads(succeed("subscribe", "--state", url, *arguments).stdout)
    assert line["snapshot"] == pointer.snapshot
    first = sorted(path.name for path in (state / "snapshots").iterdir())[0]
    succeed("snapshots", "rollback", state, first)
    succeed("snapshots", "mirror", state)
    rolled_back = read_pointer(copy / "latest.json")
    assert rolled_back
    assert (rolled_back.snapshot, rolled_back.url) == (first, url)


@pytest.mark.slow
def test_a_run_whose_mirror_cannot_be_written_learns_on_and_ends_with_an_error(
    events: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    state = tmp_path / "state"
    result = run(events, state, "-X", f"snapshots.url={(tmp_path / 'file' / 'x').as_uri()}")
    assert result.exit_code == 6
    assert "does not have the last snapshots: cannot read" in result.output
    pointer = read_pointer(state / "latest.json")
    assert pointer
    assert pointer.examples == 3000


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/run", "https://host/run can only be read"),
        ("ftp://host/run", "its scheme is one of"),
        ("kafka://bases", "only a run on Kafka sends snapshots to a topic"),
        ("state", "must be a URL with a scheme"),
    ],
)
def test_a_url_that_cannot_be_a_mirror_is_refused_before_anything_is_learned(
    events: Path, tmp_path: Path, url: str, message: str
) -> None:
    result = run(events, tmp_path / "state", "-X", f"snapshots.url={url}")
    assert result.exit_code == 3
    assert message in result.output
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
def test_a_run_on_kafka_sends_its_snapshots_to_a_topic(
    embedded_broker: str, topic: str, tmp_path: Path
) -> None:
    produced(embedded_broker, topic, slice(0, 4000))
    bases = f"{topic}.bases"
    servers = ("--bootstrap-servers", embedded_broker)
    options = [*own_topics(topic), "-X", f"snapshots.url=kafka://{bases}"]
    state = tmp_path / "state"
    succeed("run", "--topic", topic, *servers, "--until-end", "--state", state, *SMALL, *options)
    labels = [decode_label(record.headers) for record in read_records(embedded_broker, bases)]
    pointer = read_pointer(state / "latest.json")
    assert pointer
    files = {each.file for each in labels if each}
    assert {"manifest.json", "model.safetensors"} <= files
    original = Scorer(state / "snapshots" / pointer.snapshot).predict({"hour": "20"})
    state.rename(tmp_path / "gone")
    arguments = ("--cache", tmp_path / "cache", "--once", "--json", "--no-deltas")
    result = succeed(
        "subscribe", "--topic", f"{topic}.snapshots", *servers, *arguments, *own_topics(topic)
    )
    line = json.loads(result.stdout)
    assert line["snapshot"] == pointer.snapshot
    assert Scorer(Path(line["path"])).predict({"hour": "20"}) == original
