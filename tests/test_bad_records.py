"""The share of malformed records is state, and each of them has one dead letter."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.commands import command, own_topics, read_headers
from support.lineage import QUICK
from support.memory_topic import MemoryTopic
from support.patience import PATIENCE_SECONDS
from support.reliability import Outcome
from support.trainers import Partitions, assert_equal_states, final_state, finish, trainer

from stream_ctr.connectors import kafka
from stream_ctr.errors import DataError
from stream_ctr.snapshots import snapshot


def junk(n: int) -> pa.LargeBinaryArray:
    return pa.array([b"junk"] * n, pa.large_binary())


def resumed(directory: Path, source: Partitions, **options: Any) -> Path:
    built = trainer(directory, source, **options)
    newest = snapshot.newest(directory / "snapshots")
    if newest:
        built.restore(newest)
    finish(built)
    return directory


def letters(state: Path) -> Counter[str]:
    lines = (state / "dead_letters.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["offset"] for line in lines)


@pytest.mark.bad_input(
    "a burst of malformed records after many good ones", via="a log, stopped before the burst"
)
def test_a_run_that_was_stopped_before_a_burst_of_junk_goes_on_as_one_that_was_not(
    tmp_path: Path, stream: pa.LargeBinaryArray, outcome: Outcome
) -> None:
    values = [pa.concat_arrays([stream.slice(0, 3000), junk(2500), stream.slice(3000)])]
    whole = resumed(tmp_path / "whole", Partitions(values))
    parts = resumed(tmp_path / "parts", Partitions(values, stop_after=2500))
    assert not (parts / "dead_letters.jsonl").exists()
    resumed(parts, Partitions(values))
    assert_equal_states(whole, parts)
    assert letters(parts) == letters(whole) == Counter(map(str, range(3000, 5500)))
    outcome("counted with the records before the stop: goes on; ledger and all state equal")


def test_a_run_that_was_stopped_in_a_burst_of_junk_ends_at_the_same_record(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    values = [pa.concat_arrays([stream.slice(0, 1500), junk(4000)])]
    resumed(tmp_path, Partitions(values, stop_after=2000))
    assert letters(tmp_path)
    with pytest.raises(DataError, match="1501 of 3001 records read are bad"):
        resumed(tmp_path, Partitions(values))


@pytest.mark.bad_input(
    "more malformed records than input.max_bad_share", via="a log in polls of any size"
)
@pytest.mark.parametrize("seed", range(3))
def test_where_a_run_stops_for_bad_records_does_not_depend_on_the_polls(
    tmp_path: Path, stream: pa.LargeBinaryArray, seed: int, outcome: Outcome
) -> None:
    # 600 of the first 1,000, and then so few that a look at the end of a long poll passes.
    values = [pa.concat_arrays([junk(600), stream.slice(0, 5000)])]
    source = Partitions(values, seed=seed, largest=(60, 700, 20_000)[seed])
    with pytest.raises(DataError, match="600 of 1000 records read are bad"):
        resumed(tmp_path / str(seed), source)
    outcome("stops after the same record, exit code 5")


@pytest.mark.parametrize("largest", [100, 20_000])
def test_the_share_is_judged_after_every_record_and_not_before_a_thousand(
    tmp_path: Path, stream: pa.LargeBinaryArray, largest: int
) -> None:
    limits = {"input": {"read_ahead": 0, "max_bad_share": 0.2}}
    few = [pa.concat_arrays([junk(200), stream.slice(0, 5000)])]  # 200 of 1,000
    resumed(tmp_path / "few", Partitions(few, largest=largest), **limits)
    many = [pa.concat_arrays([junk(201), stream.slice(0, 5000)])]
    with pytest.raises(DataError, match="201 of 1000 records read are bad"):
        resumed(tmp_path / "many", Partitions(many, largest=largest), **limits)


def test_a_run_that_its_policy_stops_again_and_again_writes_each_letter_once(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    values = [pa.concat_arrays([stream.slice(0, 1500), junk(4000)])]
    for largest in (100, 1000, 300):
        with pytest.raises(DataError, match="1501 of 3001 records read are bad"):
            resumed(tmp_path, Partitions(values, largest=largest))
    found = letters(tmp_path)
    assert set(found.values()) == {1}
    assert found.keys() >= set(map(str, range(1500, 3001)))


def test_the_list_of_sent_letters_ends_with_the_snapshots_that_need_it(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    values = [pa.concat_arrays([junk(2), stream.slice(0, 3000)])]
    sink = MemoryTopic()
    few = {"sink": sink, "schedule": {"snapshot_examples": 1000}}
    resumed(tmp_path, Partitions(values, stop_after=1000), **few)
    assert len((tmp_path / "dead_letters.sent.1").read_text().splitlines()) == 2
    resumed(tmp_path, Partitions(values), **few)
    assert not list(tmp_path.glob("dead_letters*"))


def test_the_share_of_a_record_of_many_events_is_in_the_snapshot(
    tmp_path: Path, stream: pa.LargeBinaryArray
) -> None:
    resumed(tmp_path, Partitions([pa.concat_arrays([stream.slice(0, 2000), junk(3)])]))
    newest = snapshot.newest(tmp_path / "snapshots")
    assert newest
    assert snapshot.read_manifest(newest).bad_records == 3
    assert np.all(final_state(tmp_path)["joiner"]["counters"] >= 0)


@pytest.mark.bad_input(
    "more malformed records than input.max_bad_share", via="a Kafka topic, at two starts"
)
def test_a_topic_that_stops_every_start_has_each_letter_once(
    broker: str, topic: str, tmp_path: Path, outcome: Outcome
) -> None:
    client = kafka.client_options(broker, {})
    kafka.ensure_topic(client, topic)
    sink = kafka.KafkaSink(client)
    for n in range(1100):
        sink.send(topic, b"junk %d" % n)
    sink.flush(PATIENCE_SECONDS)
    sink.close()
    named = ("-X", "features.categorical=app")
    for _ in range(2):
        result = command(
            *("run", "--topic", topic, "--state", tmp_path, "--bootstrap-servers", broker),
            *("--until-end", *QUICK, *named, *own_topics(topic)),
        )
        assert result.exit_code == 5, result.output
        assert "1000 of 1000 records read are bad" in result.output
    values = [value for value, _ in read_headers(broker, f"{topic}.dlq")]
    assert sorted(values) == sorted(b"junk %d" % n for n in range(1100))
    outcome("exit code 5 after the same record; each dead letter once")
