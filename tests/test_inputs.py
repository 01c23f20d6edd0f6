"""Inputs one after another as one source, and what a run may go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.manifests import manifest
from support.trainers import Partitions

from stream_ctr.connectors.memory import BatchSource
from stream_ctr.errors import ConfigError, DataError
from stream_ctr.snapshots.manifest import Input, Manifest
from stream_ctr.train.inputs import Inputs
from stream_ctr.train.resume import continued, known_inputs, what_follows

SNAPSHOT = Path("00000007-20250101T000000Z")


def log(name: str, *values: bytes) -> BatchSource:
    array = pa.array(values, pa.large_binary())
    return BatchSource(lambda: [array] if len(array) else [], name=name)


class Topic(Partitions):
    """Topics with ids, of some partitions of these many records each."""

    def __init__(self, name: str = "clicks", *, partitions: Sequence[int] = (2, 3)) -> None:
        super().__init__([pa.array([b"x"] * count, pa.large_binary()) for count in partitions])
        self.partitions = tuple((name, index) for index in range(len(partitions)))
        self.paused: frozenset[int] = frozenset()

    def pause(self, partitions: frozenset[int]) -> None:
        self.paused = partitions
        super().pause(partitions)

    def lost(self) -> dict[int, int]:
        return {0: 0, 1: 5}

    def leader_epochs(self) -> dict[int, int]:
        return {1: 4}

    def expect_epochs(self, leader_epochs: Mapping[int, int]) -> None:
        self.expected = dict(leader_epochs)

    def topic_ids(self) -> dict[str, str | None]:
        return {self.partitions[0][0]: None}


ENDED = Input(kind="log", partitions=("day1:0",), ended=True)


def following(source: Topic | BatchSource) -> Inputs:
    return Inputs([source], ended=[ENDED], positions={"day1:0": 9})


def drained(inputs: Inputs) -> list[tuple[list[int], list[bytes]]]:
    polls = []
    while not inputs.finished:
        records = inputs.poll(0)
        if len(records):
            polls.append((records.partition.tolist(), records.value.to_pylist()))
    return polls


def test_partitions_after_an_ended_log_are_numbered_on_and_answered_for() -> None:
    topic = Topic()
    inputs = following(topic)
    assert inputs.partitions == (("day1", 0), ("clicks", 0), ("clicks", 1))
    assert inputs.names == ("day1:0", "clicks:0", "clicks:1")
    records = inputs.poll(0)
    assert set(records.partition.tolist()) == {1, 2}
    assert inputs.positions() == {0: 9, 1: topic.positions()[0], 2: topic.positions()[1]}
    inputs.pause(frozenset({0, 2}))
    assert topic.paused == {1}
    inputs.commit({0: 9, 1: 1, 2: 2})
    assert topic.committed == {0: 1, 1: 2}
    assert inputs.lost() == {1: 0, 2: 5}
    assert inputs.topic_ids() == {"clicks": None}
    assert inputs.leader_epochs() == {2: 4}
    inputs.seek({0: 9, 1: 0, 2: 3})
    inputs.expect_epochs({2: 7})
    assert topic.expected == {1: 7}
    assert inputs.caught_up().tolist() == [True, False, True]
    drained(inputs)
    assert [(each.kind, each.ended) for each in inputs.begun] == [("log", True), ("topics", False)]


def test_an_input_has_begun_with_its_first_poll_and_until_then_has_no_position() -> None:
    inputs = following(log("day2", b"a"))
    assert (inputs.begun, inputs.present, inputs.positions()) == ((ENDED,), range(1), {0: 9})
    assert not inputs.finished
    assert inputs.caught_up().tolist() == [True, True]  # nothing is expected of either yet
    assert len(inputs.poll(0)) == 1
    assert inputs.present == range(1, 2)
    assert inputs.caught_up().tolist() == [True, False]
    assert inputs.positions() == {0: 9, 1: 1}
    assert [each.ended for each in inputs.begun] == [True, False]


def test_the_end_of_a_log_shows_before_the_next_one_begins() -> None:
    inputs = Inputs([log("day1", b"a", b"b"), log("day2", b"c")])
    inputs.poll(0)
    inputs.poll(0)
    assert [(each.partitions, each.ended) for each in inputs.begun] == [(("day1:0",), True)]
    assert inputs.present == range(1)
    assert inputs.positions() == {0: 2}
    assert not inputs.finished
    assert drained(inputs) == [([1], [b"c"])]


@pytest.mark.parametrize(
    ("positions", "rest"),
    [
        ({0: 1}, [([0], [b"b"]), ([1, 1], [b"c", b"d"])]),
        ({0: 2}, [([1, 1], [b"c", b"d"])]),
        ({0: 2, 1: 1}, [([1], [b"d"])]),
    ],
)
def test_reading_goes_on_in_the_last_log_that_has_a_position(
    positions: dict[int, int], rest: list[tuple[list[int], list[bytes]]]
) -> None:
    inputs = Inputs([log("day1", b"a", b"b"), log("day2", b"c", b"d")])
    inputs.seek(positions)
    assert inputs.positions() == positions
    assert [each.ended for each in inputs.begun] == [True, False][2 - len(positions) :]
    assert drained(inputs) == rest


# -- what a run may go on with -------------------------------------------------------------------


def known(*inputs: Input, positions: Mapping[str, int] | None = None) -> Manifest:
    at = {name: 5 for each in inputs for name in each.partitions}
    return manifest(inputs=inputs, positions={**at, **(positions or {})}, topic_ids={})


def ended(name: str) -> Input:
    return Input(kind="log", partitions=(f"{name}:0",), ended=True)


def unread(name: str) -> Input:
    return Input(kind="log", partitions=(f"{name}:0",))


CLICKS = Input(kind="topics", partitions=("clicks:0", "clicks:1"))


@pytest.mark.parametrize(
    ("before", "given", "reads", "after"),
    [
        ([], ["a", "b"], ["a", "b"], []),
        ([unread("a")], ["a"], ["a"], []),
        ([unread("a")], ["a", "b"], ["a", "b"], []),
        ([ended("a")], ["a"], ["a"], []),
        ([ended("a")], ["b", "c"], ["b", "c"], ["a"]),
        ([ended("a"), unread("b")], ["a", "b", "c"], ["b", "c"], ["a"]),
        ([ended("a"), ended("b")], ["b", "c"], ["b", "c"], ["a"]),
        ([ended("a"), unread("b")], ["b"], ["b"], ["a"]),
    ],
)
def test_logs_given_again_are_read_on_and_others_follow(
    before: list[Input], given: Any, reads: list[str], after: list[str]
) -> None:
    inputs = continued([log(name) for name in given], known(*before), SNAPSHOT)
    assert [source.partitions[0][0] for source in inputs.sources] == reads
    assert [each.partitions[0] for each in inputs.before] == [f"{name}:0" for name in after]
    assert inputs.partitions == tuple((name, 0) for name in [*after, *reads])


def test_topics_follow_a_log_that_was_read_to_its_end_and_go_on_with_themselves() -> None:
    inputs = continued([Topic()], known(ended("day1.csv#1a"), positions={}), SNAPSHOT)
    assert what_follows(inputs) == "goes on after day1.csv (5 records) with topic clicks"
    again = continued([Topic()], known(ended("day1.csv#1a"), CLICKS), SNAPSHOT)
    assert again.names == ("day1.csv#1a:0", "clicks:0", "clicks:1")
    again.seek({0: 5, 1: 1, 2: 0})
    assert what_follows(again) is None


@pytest.mark.parametrize(
    ("before", "given", "message"),
    [
        (
            [unread("day1.csv#1a")],
            [log("day2.csv#1a")],
            r"day1.csv was not read to its end \(snapshot 00000007-.* has read 5 records\), so "
            r"day2.csv cannot follow yet; run it to its end first, with --source day1.csv, or",
        ),
        (
            [unread("day1.csv#1a")],
            [log("day1.csv#2b")],
            "day1.csv was not read to its end .* and now begins with another line",
        ),
        (
            [ended("a"), unread("b")],
            [log("a")],
            "a was read before b .*; give b, or what follows it",
        ),
        ([ended("a"), ended("b")], [log("b"), log("a")], "a was read before b"),
        ([ended("a")], [log("b"), log("b")], "b is given twice: .* rename one"),
        ([CLICKS], [log("a")], "was made from clicks, the input is a: nothing follows a topic"),
        ([CLICKS], [Topic("shown")], "nothing follows a topic"),
    ],
)
def test_another_input_is_refused_with_what_to_do(
    before: list[Input], given: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        continued(given, known(*before), SNAPSHOT)


@pytest.mark.parametrize(
    ("partitions", "message"),
    [((1, 1, 1), "partition clicks:2 was added"), ((1,), "partition clicks:1 is gone")],
)
def test_topics_whose_partitions_changed_are_refused_after_a_log_too(
    partitions: tuple[int, ...], message: str
) -> None:
    topic = Topic(partitions=partitions)
    with pytest.raises(DataError, match=message):
        continued([topic], known(ended("a"), CLICKS), SNAPSHOT)


def test_a_snapshot_without_a_list_of_inputs_knows_one_that_is_not_known_to_have_ended() -> None:
    old = manifest(inputs=(), positions={"a:0": 7}, topic_ids={})
    assert known_inputs(old) == (unread("a"),)
    assert continued([log("a"), log("b")], old, SNAPSHOT).names == ("a:0", "b:0")
    with pytest.raises(ConfigError, match="a was not read to its end"):
        continued([log("b")], old, SNAPSHOT)
    topics = manifest(
        inputs=(), positions={"clicks:0": 7, "clicks:1": 2}, topic_ids={"clicks": "x"}
    )
    assert known_inputs(topics) == (CLICKS,)


def test_ranks_divide_the_partitions_of_topics_that_follow_a_log() -> None:
    found = []
    for rank in range(3):
        inputs = Inputs([Topic(partitions=(1, 1, 1, 1))], ended=[ENDED], positions={"day1:0": 9})
        assert inputs.last == range(1, 5)
        assert inputs.ended_positions == {"day1:0": 9}
        inputs.divide(rank, 3)
        found.append([partitions for partitions, _ in drained(inputs) if partitions])
    assert found == [[[1, 4]], [[2]], [[3]]]


def test_a_log_is_not_divided() -> None:
    with pytest.raises(ConfigError, match=r"day1 cannot be read by several ranks: .*share_input"):
        Inputs([log("day1", b"a")]).divide(0, 2)
