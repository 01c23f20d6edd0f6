"""The commands as a person uses them, through the embedded broker and real Apache Kafka."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from support import forks
from support.commands import command, own_topics, read_headers, read_records, succeed
from support.lineage import QUICK, SMALL, reports
from support.lineage import newest as newest_snapshot
from support.long import only_long
from support.patience import PATIENCE_SECONDS, started, wait_until

from stream_ctr import Scorer, Subscriber
from stream_ctr.cli import runs
from stream_ctr.cli.main import main
from stream_ctr.cli.options import MISSPELT
from stream_ctr.config import known_keys
from stream_ctr.connectors import kafka
from stream_ctr.connectors.kafka import options as kafka_options
from stream_ctr.connectors.kafka import timeouts
from stream_ctr.errors import DataError
from stream_ctr.evaluate import metrics
from stream_ctr.events.decoder import Decoder
from stream_ctr.logs.open import open_log
from stream_ctr.logs.simulate import Simulation
from stream_ctr.messages import nearest
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.train import stage_timer
from stream_ctr.train.report import Report

IMPRESSIONS = 4000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "sim.jsonl"
    succeed("simulate", "--impressions", IMPRESSIONS, "--seed", 5, "--out", path)
    return path


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("trained") / "state"
    succeed("run", "--source", log, "--state", state, "--until-end", *QUICK)
    return state


# -- the main job --------------------------------------------------------------------------------


def write_strangers(log: Path, path: Path) -> int:
    """Write the events of a log with clicks of other impressions; return how many clicks."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    clicks = [event for event in events if event["kind"] == "click"]
    for event in clicks:
        event["impression_id"] += "?"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return len(clicks)


@pytest.mark.parametrize("options", [(), ("-X", "snapshots.gate_clicks=0")])
def test_a_run_that_published_nothing_says_why_in_its_last_line_and_its_exit_code(
    log, tmp_path, options
):
    strangers = tmp_path / "strangers.jsonl"
    clicks = write_strangers(log, strangers)
    arguments = ["run", "--source", strangers, "--state", tmp_path / "state", *QUICK, *options]
    last_line = (
        f"error: nothing was published: it has seen no click: {clicks:,} clicks came, "
        "and none found its impression"
    )
    for _ in range(2):  # the second run has nothing more to learn
        result = command(*arguments)
        assert result.exit_code == 5
        assert result.stderr.splitlines()[-1] == last_line
        assert not (tmp_path / "state" / "latest.json").exists()
    final = msgspec.convert(reports(tmp_path / "state")[-1], Report)
    assert final.click_coverage == 0
    with pytest.raises(DataError):
        runs.require_published(final)
    runs.require_published(msgspec.structs.replace(final, kind="stopped"))


def test_a_run_that_resumes_at_the_end_of_its_input_has_published(log, trained, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(trained, state)
    succeed("run", "--source", log, "--state", state, *QUICK)
    assert reports(state)[-1]["withheld"] == []


@pytest.mark.parametrize("asked", [(), ("--profile",)])
def test_a_run_prints_its_profile_when_it_is_asked_to(log, tmp_path, asked):
    printed = succeed("run", "--source", log, "--state", tmp_path / "state", *asked, *QUICK).stdout
    table = stage_timer.table(reports(tmp_path / "state")[-1]["profile"])
    assert (table in printed) == bool(asked)


@pytest.mark.parametrize(
    ("partitions", "wire"),
    [
        *((1, "json"), (3, "arrow")),
        *only_long(((3, "json"), (1, "arrow"))),
    ],
)
@pytest.mark.slow
def test_replay_then_run_learns_all_that_was_in_the_topic_and_what_a_file_gives(
    broker, topic, log, trained, tmp_path, partitions, wire
):
    succeed(
        "replay",
        log,
        "--topic",
        topic,
        "--partitions",
        partitions,
        "--bootstrap-servers",
        broker,
        "--wire",
        wire,
        "--batch",
        300,
    )
    args = [
        "--topic",
        topic,
        "--state",
        tmp_path,
        "--bootstrap-servers",
        broker,
        "--until-end",
        *QUICK,
        *own_topics(topic),
    ]
    succeed("run", *args)
    final, from_file = reports(tmp_path)[-1], reports(trained)[-1]
    assert final["kind"] == "final"
    assert final["ledger"] == from_file["ledger"]  # the same labels for the same impressions
    assert final["counters"]["clicks"] == from_file["counters"]["clicks"]
    if partitions == 1:
        assert (
            final["models"] == from_file["models"]
        )  # and the same order of learning: the same model, bit for bit
        assert newest_snapshot(tmp_path).weights_sha256 == newest_snapshot(trained).weights_sha256

    manifest = snapshot.verify(snapshot.newest(tmp_path / "snapshots"))
    ends = {f"{topic}:{p}": end for p, end in ends_of(broker, topic).items()}
    assert manifest.positions == ends
    assert committed(broker, topic) == {p: ends[f"{topic}:{p}"] for p in range(partitions)}
    written = [json.loads(value) for _, value in read_all(broker, f"{topic}.metrics")]
    assert written == reports(tmp_path)
    key, pointer = read_all(broker, f"{topic}.snapshots")[-1]
    assert key == b"default"
    # Each is sealed over its own spaces.
    sent, kept = (json.loads(text) for text in (pointer, (tmp_path / "latest.json").read_bytes()))
    assert sent | {"sha256": ""} == kept | {"sha256": ""}


@pytest.mark.slow
def test_run_on_an_existing_state_resumes_and_equals_one_run_over_all(
    broker, topic, log, trained, tmp_path
):
    values = pa.concat_arrays([batch.value for batch in open_log(log).batches()])
    client = kafka.client_options(broker, {})
    kafka.ensure_topic(client, topic)
    args = [
        "--topic",
        topic,
        "--state",
        tmp_path,
        "--bootstrap-servers",
        broker,
        *QUICK,
        *own_topics(topic),
    ]
    sink = kafka.KafkaSink(client)
    # An --until-end closes every window at the end of what it saw; a run that is stopped does not.
    # So the first part is stopped.
    sink.send_batch(topic, values.slice(0, 2500), np.full(2500, -1), None)
    sink.flush(PATIENCE_SECONDS)
    process = start(*args)
    wait_until(lambda: has_learned(tmp_path, process))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert reports(tmp_path)[-1]["kind"] == "stopped"
    sink.send_batch(topic, values.slice(2500), np.full(len(values) - 2500, -1), None)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    result = succeed("run", *args, "--until-end")
    assert "resumed from snapshot" in result.output
    final, whole = reports(tmp_path)[-1], reports(trained)[-1]
    assert final["ledger"] == whole["ledger"]
    assert final["models"] == whole["models"]


def test_impressions_and_clicks_may_have_a_topic_each(broker, topic, log, trained, tmp_path):
    client = kafka.client_options(broker, {})
    decoder = Decoder(Simulation(1).fields)
    sink = kafka.KafkaSink(client)
    for batch in open_log(log).batches():
        events, _ = decoder.decode(batch.value)
        for name, rows in ((topic, events.impressions.row), (f"{topic}-clicks", events.clicks.row)):
            kafka.ensure_topic(client, name)
            sink.send_batch(name, batch.value.take(pa.array(rows)), batch.time[rows], None)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    succeed(
        "run",
        "--topic",
        topic,
        "--click-topic",
        f"{topic}-clicks",
        "--state",
        tmp_path,
        "--bootstrap-servers",
        broker,
        "--until-end",
        *QUICK,
        *own_topics(topic),
    )
    assert reports(tmp_path)[-1]["ledger"] == reports(trained)[-1]["ledger"]


def test_bad_records_go_to_the_dead_letter_topic_untouched_and_harm_no_other(
    broker, topic, log, trained, tmp_path
):
    client = kafka.client_options(broker, {})
    kafka.ensure_topic(client, topic)
    sink = kafka.KafkaSink(client)
    sink.send(topic, b"\xff\x00junk")
    for batch in open_log(log).batches():
        sink.send_batch(topic, batch.value, batch.time, batch.key)
    sink.send(topic, b'{"kind":"impression"}')
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    succeed(
        "run",
        "--topic",
        topic,
        "--state",
        tmp_path,
        "--bootstrap-servers",
        broker,
        "--until-end",
        *QUICK,
        *own_topics(topic),
    )
    final = reports(tmp_path)[-1]
    assert final["ledger"] == reports(trained)[-1]["ledger"]
    assert final["counters"]["rejected"] == 2
    letters = read_headers(broker, f"{topic}.dlq")
    assert [(value, headers["__stream_ctr.errors.reason"]) for value, headers in letters] == [
        (b"\xff\x00junk", b"not_json"),
        (b'{"kind":"impression"}', b"missing_id"),
    ]
    assert letters[0][1]["__stream_ctr.errors.topic"] == topic.encode()
    assert (
        letters[1][1]["__stream_ctr.errors.offset"]
        == str(final["counters"]["records"] - 1).encode()
    )


@pytest.mark.slow
@pytest.mark.fault(3, injected="SIGTERM, SIGINT while it learns from a topic")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_cleanly_with_a_snapshot(
    embedded_broker, topic, log, tmp_path, number, outcome
):
    succeed("replay", log, "--topic", topic, "--bootstrap-servers", embedded_broker)
    process = start(
        "--topic",
        topic,
        "--state",
        tmp_path,
        "--bootstrap-servers",
        embedded_broker,
        *QUICK,
        *own_topics(topic),
    )
    wait_until(lambda: has_learned(tmp_path, process))
    process.send_signal(number)
    assert process.wait(PATIENCE_SECONDS) == 0
    last = reports(tmp_path)[-1]
    assert last["kind"] == "stopped"
    _, tensors = snapshot.load(snapshot.newest(tmp_path / "snapshots"))
    waiting = len(tensors["examples"]["time"]) + len(tensors["joiner"]["pending.time"])
    assert last["examples"] + waiting == IMPRESSIONS  # what is not learned yet is in the snapshot
    assert waiting > 0
    outcome("the batch is finished, a snapshot holds all that was read, exit 0")


@pytest.mark.slow
def test_a_second_trainer_on_the_same_state_is_refused_and_told_who_has_it(
    embedded_broker, topic, log, tmp_path
):
    succeed("replay", log, "--topic", topic, "--bootstrap-servers", embedded_broker)
    process = start(
        "--topic",
        topic,
        "--state",
        tmp_path,
        "--bootstrap-servers",
        embedded_broker,
        *QUICK,
        *own_topics(topic),
    )
    try:
        wait_until(
            lambda: (tmp_path / "lock").exists() and (tmp_path / "lock").read_text().strip() != ""
        )
        result = command("run", "--source", log, "--state", tmp_path)
        assert result.exit_code == 3
        assert f"in use by process {process.pid}" in result.output
    finally:
        process.kill()
        process.wait()


def test_simulate_writes_to_standard_output(log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = succeed("simulate", "--impressions", IMPRESSIONS, "--seed", 5, "--out", "-")
    assert result.stdout_bytes == log.read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_path_is_not_the_working_directory(log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("run", "--source", log, "--state", "")
    assert result.exit_code == 2
    assert "the path is empty" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_demo_without_a_state_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = succeed("demo", "--impressions", 2000, *QUICK)
    assert result.stdout.splitlines()[-1].startswith("state:      removed")
    assert list(tmp_path.glob("stream-ctr-demo-*")) == []


# -- several models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("several") / "state"
    named = ["--model", "fm", "--model", "deepfm", "--model", "lr"]
    printed = succeed("run", "--source", log, "--state", state, *named, *SMALL).stderr.splitlines()
    pairs = [line.split()[:4] for line in printed[-3:]]
    assert pairs == [["fm", "-", name, "4,000"] for name in ("deepfm", "lr", "river_ftrl")]
    return state


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_told_of_before_the_log_is_read(log, tmp_path):
    refused = command("run", "--source", log, "--state", tmp_path, "--device", "cuda", *QUICK)
    assert refused.exit_code == 3
    assert "no CUDA GPU is available here; use --device cpu or auto" in refused.output
    assert "inferred as" not in refused.output


def test_the_first_model_named_is_published_and_the_others_learn_the_same_examples(
    several, trained
):
    final = reports(several)[-1]
    assert list(final["models"]) == ["fm", "deepfm", "lr", "river_ftrl"]
    assert final["models"]["deepfm"] == reports(trained)[-1]["models"]["deepfm"]
    manifest = snapshot.verify(snapshot.newest(several / "snapshots"))
    assert manifest.learner.model == "fm"
    assert list(manifest.beside) == ["deepfm", "lr"]


def test_score_and_a_subscriber_can_take_a_model_from_beside(log, several, trained):
    # The blend of `trained` has a DeepFM that learned the same.
    beside, member, published = (
        succeed("score", "--snapshot", state, log, *named).stdout.splitlines()
        for state, named in (
            (several, ["--model", "deepfm"]),
            (trained, ["--model", "deepfm"]),
            (several, []),
        )
    )
    assert all(map(str.__eq__, beside, member))
    assert beside[0] != published[0]
    subscriber = Subscriber(several, model="deepfm")
    assert subscriber.next(PATIENCE_SECONDS)
    row = json.loads(log.read_text().splitlines()[0])["features"]
    assert subscriber.predict([row])[0] == float(beside[0].split("\t")[1])
    assert (
        json.loads(
            succeed("subscribe", "--state", several, "--once", "--json", "--model", "deepfm").stdout
        )["examples"]
        == IMPRESSIONS
    )
    misspelled = command("subscribe", "--state", several, "--once", "--model", "lr_dmn")
    assert misspelled.exit_code == 3
    assert "no model 'lr_dmn'; did you mean 'lr_dnn'?" in misspelled.output
    refused = command("score", "--snapshot", several, log, "--model", "opnn")
    assert refused.exit_code == 6
    assert "no model 'opnn'; it has fm, deepfm, lr" in refused.output


@pytest.mark.slow
def test_a_state_goes_on_with_the_models_it_began_with_and_refuses_others(log, several):
    state = several.parent / "again"
    shutil.copytree(several, state)
    assert (
        "resumed from snapshot" in succeed("run", "--source", log, "--state", state, *SMALL).output
    )
    assert list(reports(state)[-1]["models"]) == ["fm", "deepfm", "lr", "river_ftrl"]
    other = command("run", "--source", log, "--state", state, "--model", "fm", *SMALL)
    assert other.exit_code == 3
    assert "made with the models fm, deepfm, lr, not with fm, ftrl" in other.output


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["deepfn"], "there is no model 'deepfn'; did you mean 'deepfm'?"),
        (["fm", "fm"], "a model is listed twice (model.name counts too): fm"),
    ],
)
def test_a_model_that_is_not_or_is_named_twice_is_an_error(log, tmp_path, named, message):
    result = command(
        "run",
        "--source",
        log,
        "--state",
        tmp_path,
        *(part for name in named for part in ("--model", name)),
    )
    assert result.exit_code == 3
    assert message in result.output


def test_the_nine_systems_are_listed_with_what_the_paper_says_of_them():
    lines = succeed("models").stdout.splitlines()
    titles = ["LR", "FM", "FNN", "IPNN", "OPNN", "PNN*", "LR & DNN", "FM & DNN", "DeepFM"]
    at = lines[0].index("in the paper")
    assert [line[at : lines[0].index("no pre-training")].strip() for line in lines[1:10]] == titles
    known = {
        told["title"]: told
        for told in map(json.loads, succeed("models", "--json").stdout.splitlines())
    }
    assert list(known) == titles
    properties = {
        title: (not of["pretraining"], of["high_order"], of["low_order"], not of["engineering"])
        for title, of in known.items()
    }
    table_1 = {
        "FNN": (0, 1, 0, 1),
        "PNN*": (1, 1, 0, 1),
        "LR & DNN": (1, 1, 1, 0),
        "DeepFM": (1, 1, 1, 1),
    }
    assert {title: properties[title] for title in table_1} == table_1
    for line, (title, told) in zip(lines[1:10], known.items(), strict=True):
        assert line.split()[0] == told["name"]
        assert [cell == "yes" for cell in line[at:].removeprefix(title).split()[:4]] == [
            bool(has) for has in properties[title]
        ]


# -- serving -------------------------------------------------------------------------------------


def test_score_prints_the_trainers_own_probabilities(log, trained):
    path = snapshot.newest(trained / "snapshots")
    printed = succeed("score", "--snapshot", path, log).stdout.splitlines()
    ids, probabilities = zip(*(line.split("\t") for line in printed), strict=True)
    assert len(printed) == IMPRESSIONS
    scorer = Scorer(path)
    events = [
        Decoder(scorer.fields).decode(batch.value)[0].impressions
        for batch in open_log(log).batches()
    ]
    assert list(ids) == [name for part in events for name in part.impression_id.to_pylist()]

    rows, values = scorer.hasher.rows(
        {name: column.slice(0, 128) for name, column in events[0].features.items()}
    )
    own = scorer.model.predict(rows, values)
    assert metrics.probabilities(own).tolist() == [float(p) for p in probabilities[:128]]
    as_json = [
        json.loads(line)
        for line in succeed("score", "--snapshot", trained, log, "--json").stdout.splitlines()
    ]
    assert as_json[7] == {"impression_id": ids[7], "probability": float(probabilities[7])}


def test_predict_in_python_equals_score(log, trained):
    scorer = Scorer(snapshot.newest(trained / "snapshots"))
    rows = [
        json.loads(line)["features"]
        for line in log.read_text().splitlines()
        if '"impression"' in line
    ][:50]
    printed = succeed("score", "--snapshot", trained, log).stdout.splitlines()[:50]
    assert scorer.predict(rows).tolist() == [float(line.split("\t")[1]) for line in printed]


def test_subscribe_once_prints_a_verified_snapshot_and_runs_the_hook(trained, tmp_path):
    marker = tmp_path / "hook"
    program = (
        f"import os,sys; open('{marker}','w')"
        ".write(sys.argv[1] + os.environ['STREAM_CTR_SNAPSHOT_ID'])"
    )
    hook = f'{sys.executable} -c "{program}" {{path}}'
    line = json.loads(
        succeed("subscribe", "--state", trained, "--once", "--json", "--exec", hook).stdout
    )
    assert line["verified"] is True
    assert line["examples"] == IMPRESSIONS
    assert marker.read_text() == line["path"] + line["snapshot"]
    assert line["snapshot"] in succeed("subscribe", "--state", trained, "--once").stdout


@pytest.mark.security(
    "a hook runs nothing but its command", how="{path} within a text that a shell reads"
)
@pytest.mark.parametrize(
    "hook", ["sh -c 'cp -r {path} served'", "sh -c {path}.sh", "env X={path} reload"]
)
def test_the_path_of_a_hook_is_a_word_of_its_own(tmp_path, hook, outcome):
    result = command("subscribe", "--state", tmp_path, "--once", "--exec", hook)
    assert result.exit_code == 2
    message = " ".join(result.output.replace("\u2502", " ").split())
    assert "{path} must be a word of its own in the command of --exec" in message
    assert "STREAM_CTR_SNAPSHOT" in message
    outcome("refused; the environment variable STREAM_CTR_SNAPSHOT is named")


def test_a_shell_of_a_hook_gets_the_path_as_a_variable_and_as_an_argument(trained, tmp_path):
    state = tmp_path / "$(touch ran)" / "state"
    shutil.copytree(trained, state)
    # Snapshots beside `latest.json` are found where they are, whatever path it names.
    snapshot = json.loads((state / "latest.json").read_text())["snapshot"]
    path = state / "snapshots" / snapshot
    hook = f"""sh -c 'cd "{tmp_path}" && echo "$STREAM_CTR_SNAPSHOT" "$0" > found' {{path}}"""
    succeed("subscribe", "--state", state, "--once", "--exec", hook)
    assert (tmp_path / "found").read_text() == f"{path} {path}\n"
    assert not (tmp_path / "ran").exists()


def test_subscribe_once_without_any_snapshot_exits_6(tmp_path):
    result = command("subscribe", "--state", tmp_path, "--once", "--timeout", "0.3")
    assert result.exit_code == 6
    assert "no valid snapshot was published within 0.3 s" in result.output


def test_a_subscriber_refuses_a_flipped_byte_and_keeps_the_model_it_has(log, tmp_path):
    args = [
        "run",
        "--source",
        log,
        "--state",
        tmp_path,
        *QUICK,
        "-X",
        "schedule.snapshot_examples=1500",
    ]
    succeed(*args)
    subscriber = Subscriber(tmp_path)
    assert subscriber.next(PATIENCE_SECONDS)
    newest = snapshot.newest(tmp_path / "snapshots")
    before = subscriber.predict([{"app_id": "a1"}])
    model = newest / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-100] ^= 1
    model.write_bytes(data)
    (tmp_path / "latest.json").write_text(
        (tmp_path / "latest.json").read_text() + " "
    )  # published again
    assert subscriber.next(1.0) is None
    assert subscriber.predict([{"app_id": "a1"}]) == before
    result = command("score", "--snapshot", newest, log)
    assert result.exit_code == 6
    assert "model.safetensors" in result.output


def test_a_subscriber_on_the_topic_gets_the_newest_and_swaps_while_it_serves(
    broker, topic, log, tmp_path
):
    succeed("replay", log, "--topic", topic, "--bootstrap-servers", broker)
    client = kafka.client_options(broker, {})
    snapshots = f"{topic}.snapshots"
    kafka.ensure_topic(client, snapshots, compacted=True)
    seen: list[str] = []
    reader = kafka.PointerReader(client, snapshots)
    with Subscriber(
        TopicPointers(reader), on_snapshot=lambda pointer: seen.append(pointer.snapshot)
    ) as subscriber:
        succeed(
            "run",
            "--topic",
            topic,
            "--state",
            tmp_path,
            "--bootstrap-servers",
            broker,
            "--until-end",
            *QUICK,
            *own_topics(topic),
            "-X",
            "schedule.snapshot_examples=1500",
            "-X",
            "snapshots.keep=10",
        )
        newest = snapshot.snapshot_ids(tmp_path / "snapshots")[-1]
        wait_until(lambda: seen[-1:] == [newest])
        assert 0 < subscriber.predict({"app_id": "a1"}) < 1
    reader.close()
    line = succeed(
        "subscribe", "--topic", snapshots, "--bootstrap-servers", broker, "--once", "--json"
    ).stdout
    assert json.loads(line)["snapshot"] == newest


@pytest.mark.slow
def test_a_subscriber_in_another_process_sees_each_published_snapshot(log, tmp_path):
    """How soon is measured by `tests/bench/quality.py freshness`."""
    state = tmp_path / "state"
    state.mkdir()
    command = ["subscribe", "--state", state, "--json"]
    follower = started(forks.start(*command, stdout=subprocess.PIPE, text=True))
    succeed("run", "--source", log, "--state", state, *QUICK)
    pointer = json.loads(follower.stdout.readline())
    assert pointer["verified"] is True
    assert pointer["snapshot"] == snapshot.newest(state / "snapshots").name
    follower.send_signal(signal.SIGTERM)
    assert follower.wait(PATIENCE_SECONDS) == 0


# -- history -------------------------------------------------------------------------------------


def test_the_open_bandit_log_joins_to_the_last_impression(tmp_path):
    path = Path(__file__).parent / "data" / "obd" / "impressions.csv"
    result = succeed(
        "run",
        "--source",
        path,
        "--state",
        tmp_path,
        *QUICK,
        "--config",
        Path(__file__).parents[1] / "configs" / "obd.toml",
    )
    rows = path.read_text().splitlines()[1:]
    clicked = sum(row.split(",")[5] == "1" for row in rows)
    final = reports(tmp_path)[-1]
    assert final["examples"] == final["counters"]["impressions"] == len(rows)
    assert final["counters"]["clicks"] == clicked
    assert final["counters"]["clicks_joined"] + final["counters"]["clicks_late"] == clicked
    assert "no click times" in result.output
    assert any("no click times" in note for note in final["notes"])


def test_simulate_writes_the_same_bytes_for_the_same_seed(log, tmp_path):
    succeed(
        "simulate", "--impressions", IMPRESSIONS, "--seed", 5, "--out", tmp_path / "again.jsonl"
    )
    assert (tmp_path / "again.jsonl").read_bytes() == log.read_bytes()


def test_simulate_writes_the_drift_that_is_asked_for(tmp_path):
    streams = {}
    for drift in ("none", "rate"):
        path = tmp_path / f"{drift}.jsonl"
        succeed("simulate", "--impressions", 2000, "--drift", drift, "--out", path)
        streams[drift] = [json.loads(line) for line in path.read_text().splitlines()]
    plain, falling = (
        [event["true_probability"] for event in events if event["kind"] == "impression"]
        for events in streams.values()
    )
    assert falling[:1000] == plain[:1000]
    assert sum(falling[1000:]) < sum(plain[1000:]) / 3


@pytest.mark.slow
def test_replay_at_a_multiple_of_real_time_takes_its_time(embedded_broker, topic, tmp_path):
    values = [
        json.dumps(
            {
                "kind": "impression",
                "impression_id": str(i),
                "time": 1735689600000 + 1000 * i,
                "features": {"a": "x"},
            }
        )
        for i in range(21)
    ]
    path = tmp_path / "slow.jsonl"
    path.write_text("\n".join(values))
    began = time.monotonic()
    succeed(
        "replay", path, "--topic", topic, "--bootstrap-servers", embedded_broker, "--speed", "10"
    )
    assert time.monotonic() - began >= 2.0  # 20 s of events at ten times real time
    assert len(read_all(embedded_broker, topic)) == 21


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_broker_exits_4_and_says_three_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", 2.0)
    result = command(
        "run", "--topic", "clicks", "--bootstrap-servers", "127.0.0.1:1", "--state", tmp_path
    )
    assert result.exit_code == 4
    assert "no Kafka broker answered within 2 s" in result.output
    for way in ("stream-ctr broker", "deploy/compose.yaml", "--bootstrap-servers", "--source"):
        assert way in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "-X", "learn.bach_size=3"], 3, "did you mean 'learn.batch_size'"),
        (
            ["run", "-X", "lern.batch_size=3"],
            3,
            "unknown key 'lern.batch_size'; did you mean 'learn.batch_size'",
        ),
        (["run", "-X", "batch_size=3"], 3, "did you mean 'learn.batch_size'"),
        (["run", "-X", "securty.protocol=SSL"], 3, "did you mean 'security.protocol'"),
        (["run", "-X", "novalue"], 2, "KEY=VALUE"),
        (["run", "--source", "x.jsonl", "-X", "ssl.cafil=x"], 3, "ssl.cafil"),
        (["run", "-X", "metrics.window=0s"], 3, "metrics.window: must be at least 1ms"),
        (["run", "-X", "learn.dense_learning_rate=inf"], 3, "learn.dense_learning_rate"),
        (["subscribe", "--state", ".", "--exec", "echo '{path"], 2, "--exec"),
        (["subscribe", "--state", ".", "--exec", "nosuchprogram {path}"], 2, "nosuchprogram"),
        (["run", "--config", "missing.toml"], 3, "cannot read missing.toml"),
        (["run", "--source", "missing.csv"], 2, "missing.csv"),
        (["run", "--source", "."], 5, "."),
        (["run", "--device", "tpu"], 2, "tpu"),
        (["replay", "x.tsv", "--speed", "fast"], 2, "--speed is max or a positive number"),
        (["score", "--snapshot", ".", "x"], 6, "manifest"),
        (["runn"], 2, "runn"),
    ],
)
def test_a_mistake_has_its_exit_code_and_a_message_that_names_it(
    arguments: Sequence[str], code, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = command(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_no_kafka_option_is_taken_for_a_misspelt_key_of_the_configuration():
    options = kafka_options._OPTIONS.keys() | kafka_options._REFUSED.keys()
    assert len(options) > 50
    assert not [name for name in options if nearest(name, known_keys(), cutoff=MISSPELT)]


@pytest.mark.parametrize(
    ("lines", "seen"),
    [
        (
            ['{"kind":"click","impression_id":"a","time":1735689600000}'] * 3,
            "nothing to learn from. Of the first 3 records 0 are impressions without features, "
            "3 are clicks",
        ),
        (
            ['{"kind":"view","impression_id":"a","time":1735689600000}'],
            "nothing to learn from. The first malformed record: kind must be impression, click or "
            "example, got 'view'",
        ),
        (
            ['{"type":"click","impression_id":"a","time":1735689600000}'],
            "there is no column of kinds, labels or click times",
        ),
    ],
)
def test_a_log_without_impressions_is_refused_with_what_is_in_it(lines, seen, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f"{line}\n" for line in lines))
    result = command("run", "--source", log, "--state", tmp_path / "state")
    assert result.exit_code == 5
    assert seen in result.output


def test_score_says_that_there_is_no_snapshot_yet_or_no_impression(log, trained, tmp_path):
    (tmp_path / "begun").mkdir()
    assert (
        "no run has left one in it"
        in command("score", "--snapshot", tmp_path / "begun", log).output
    )
    clicks = tmp_path / "clicks.jsonl"
    clicks.write_text(
        "".join(line for line in log.read_text().splitlines(keepends=True) if '"click"' in line)
    )
    assert clicks.stat().st_size
    result = command("score", "--snapshot", trained, clicks)
    assert result.exit_code == 0
    assert "no impression to score" in result.output
    assert "no impression" not in command("score", "--snapshot", trained, log).output


@pytest.mark.slow
def test_servers_of_a_properties_file_are_used_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(timeouts, "BOOTSTRAP_SECONDS", 1.0)
    properties = tmp_path / "client.properties"
    properties.write_text("bootstrap.servers=127.0.0.1:2\n")
    result = command("run", "--kafka-config", properties, "--state", tmp_path / "a")
    assert (result.exit_code, "127.0.0.1:2" in result.output) == (4, True)
    result = command(
        "run",
        "--kafka-config",
        properties,
        "--bootstrap-servers",
        "127.0.0.1:3",
        "--state",
        tmp_path / "b",
    )
    assert (result.exit_code, "127.0.0.1:3" in result.output) == (4, True)


@pytest.mark.slow
def test_a_log_is_told_from_another_one_of_the_same_name(log, tmp_path):
    """The same log elsewhere is the same log. A shorter one lacks what comes next."""
    state = tmp_path / "state"
    succeed("run", "--source", log, "--state", state, *QUICK)
    moved = tmp_path / "moved" / log.name
    moved.parent.mkdir()
    moved.write_bytes(log.read_bytes())
    again = succeed("run", "--source", moved, "--state", state, *QUICK)
    assert "goes on after" not in again.output
    moved.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:100]))
    result = command("run", "--source", moved, "--state", state, *QUICK)
    assert result.exit_code == 5
    assert "another --state directory" in result.output
    other = tmp_path / log.name
    Simulation(3000, seed=6).write_jsonl(other)
    then = succeed("run", "--source", other, "--state", state, *QUICK)
    assert f"goes on after {log.name}" in then.output


@pytest.mark.slow
def test_fields_of_a_live_topic_are_inferred_from_more_than_its_first_record(
    embedded_broker, topic, tmp_path
):
    client = kafka.client_options(embedded_broker, {})
    kafka.ensure_topic(client, topic)
    arguments = [
        "--topic",
        topic,
        "--state",
        tmp_path,
        "--bootstrap-servers",
        embedded_broker,
        *QUICK,
        *own_topics(topic),
    ]
    process = start(*arguments, stderr=subprocess.PIPE)
    assert process.stderr
    said = iter(process.stderr.readline, b"")
    assert any(b"waiting for the first impressions" in line for line in said)
    sink = kafka.KafkaSink(client)
    for i in range(30):
        features = {"app": "x"} if i == 0 else {"app": "x", "campaign": "c", "price": 1.5}
        event = {
            "kind": "impression",
            "impression_id": str(i),
            # The last one is a label window later: nothing can be learned before.
            "time": int(time.time() * 1000) + 60_000 * (i == 29),
            "features": features,
        }
        sink.send(topic, json.dumps(event).encode())
        sink.flush(PATIENCE_SECONDS)
    assert any(b"no fields configured; inferred" in line for line in said)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, rest
    manifest = snapshot.verify(snapshot.newest(tmp_path / "snapshots"))
    assert [(field.name, field.kind) for field in manifest.schema.fields] == [
        ("app", "categorical"),
        ("campaign", "categorical"),
        ("price", "numeric"),
    ]


@pytest.mark.slow
def test_a_signal_while_waiting_for_impressions_ends_with_0(embedded_broker, topic, tmp_path):
    kafka.ensure_topic(kafka.client_options(embedded_broker, {}), topic)
    arguments = [
        "--topic",
        topic,
        "--state",
        tmp_path,
        "--bootstrap-servers",
        embedded_broker,
        *QUICK,
        *own_topics(topic),
    ]
    process = start(*arguments, stderr=subprocess.PIPE)
    assert process.stderr
    assert any(
        b"waiting for the first impressions" in line for line in iter(process.stderr.readline, b"")
    )
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, b"nothing was learned" in said) == (0, True), said


def test_a_topic_that_does_not_exist_is_said_so(embedded_broker, tmp_path):
    missing = f"missing-{uuid.uuid4().hex}"
    result = command(
        "run", "--topic", missing, "--bootstrap-servers", embedded_broker, "--state", tmp_path
    )
    assert result.exit_code == 4
    assert missing in result.output


def test_every_command_says_what_it_does_and_help_is_quick():
    for name, sub in main.commands.items():
        assert sub.help, name
        assert "stream-ctr" in sub.help or name in ("config", "broker", "demo"), name
        for parameter in sub.params:
            if isinstance(parameter, __import__("click").Option):
                assert parameter.help or parameter.show_default, f"{name} {parameter.name}"
    heavy = ("torch", "river", "pyarrow", "numba", "kafka")
    program = f"import sys, stream_ctr.cli; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_demo_shows_both_models_the_best_possible_logloss_and_a_subscriber(
    embedded_broker, tmp_path
):
    result = succeed(
        "demo",
        "--impressions",
        5000,
        "--seed",
        1,
        "--state",
        tmp_path,
        *SMALL,
        "-X",
        "join.label_window=10m",
    )
    newest = reports(tmp_path)[-1]["snapshot"]
    for part in (
        "deepfm",
        "river_ftrl",
        "best possible",
        f"subscriber: loaded {newest}",
        "reports.jsonl",
    ):
        assert part in result.stdout
    assert (
        reports(tmp_path)[-1]["best_possible_logloss"] < reports(tmp_path)[-1]["constant_logloss"]
    )


# -- what the tests need -------------------------------------------------------------------------


def start(*arguments: object, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """`stream-ctr run` as a process of its own."""
    environment = {**os.environ, "STREAM_CTR_SCHEDULE__REPORT_EVERY": "500ms"}
    return started(forks.start("run", *arguments, env=environment, stderr=stderr))


def has_learned(state: Path, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None
    return (state / "reports.jsonl").exists() and any(
        line["kind"] == "report" and line["examples"] for line in reports(state)
    )


def consumer(servers: str, **options: Any):
    from kafka import KafkaConsumer

    return KafkaConsumer(
        bootstrap_servers=servers, auto_offset_reset="earliest", enable_auto_commit=False, **options
    )


def ends_of(servers: str, topic: str) -> dict[int, int]:
    source = kafka.KafkaSource([topic], client=kafka.client_options(servers, {}), group="test")
    ends = source.ends()
    source.close()
    return ends


def committed(servers: str, topic: str) -> dict[int, int]:
    from kafka import TopicPartition

    reader = consumer(servers, group_id="stream-ctr")
    offsets = {
        p: reader.committed(TopicPartition(topic, p))
        for p in sorted(reader.partitions_for_topic(topic))
    }
    reader.close()
    return offsets


def read_all(servers: str, topic: str) -> list[tuple[bytes, bytes]]:
    return [(record.key or b"", record.value or b"") for record in read_records(servers, topic)]


@pytest.mark.parametrize("command", ["score", "snapshots ls", "snapshots verify"])
def test_a_path_that_the_system_refuses_is_a_message(command: str, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    options = ["--snapshot", str(path), "-"] if command == "score" else [str(path)]
    result = CliRunner().invoke(main, [*command.split(), *options], input="{}")
    assert result.exit_code in (5, 6), result.output
    assert "File name too long" in result.output
    assert len(result.output) < 400
