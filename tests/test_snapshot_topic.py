"""One run holds a name on the snapshot topic, whatever the order in which runs read and write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec import structs
from support.manifests import TIME_MS, sealed, write_snapshot
from support.memory_topic import Away, MemoryTopic, pointers_on, topic_of

from stream_ctr.errors import BrokerError, ConfigError
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import NewerFormat
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.pointer import FORMAT, Pointer, encode_pointer, read_pointer
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.snapshot_topic import CopyAhead, Holder, NameHeld, SnapshotTopic

A, B, C = ("a" * 32, "b" * 32, "c" * 32)
ABOVE_ALL = (1 << 30, 0)


def pointer(run: str, rank: tuple[int, int] = (1, 1), replaces: tuple[str, ...] = ()) -> Pointer:
    epoch, sequence = rank
    name = snapshot.new_id(sequence, TIME_MS)
    return Pointer(
        snapshot=name,
        path=f"/{run}/snapshots/{name}",
        manifest_sha256="0" * 64,
        run=run,
        replaces=replaces,
        model="default",
        epoch=epoch,
        sequence=sequence,
        examples=1000,
        event_time_ms=TIME_MS,
        created_ms=TIME_MS,
    )


# -- the holder ----------------------------------------------------------------------------------

WITHDRAWN = None
RECORDS = [
    ("the first pointer", [pointer(A)], A),
    ("another run", [pointer(A), pointer(B, (9, 9))], A),
    ("a replacement", [pointer(A, (9, 9)), pointer(B, replaces=(A,))], B),
    ("the replaced run", [pointer(A), pointer(B, replaces=(A,)), pointer(A, (9, 9))], B),
    ("it replaces back", [pointer(A), pointer(B, replaces=(A,)), pointer(A, replaces=(B,))], B),
    ("two replace one", [pointer(A), pointer(B, replaces=(A,)), pointer(C, replaces=(A,))], B),
    ("a chain", [pointer(A), pointer(B, replaces=(A,)), pointer(C, replaces=(A, B))], C),
    ("a compacted chain", [pointer(A), pointer(C, replaces=(A, B))], C),
    ("withdrawn", [pointer(A), WITHDRAWN], None),
    ("another after it", [pointer(A), WITHDRAWN, pointer(B)], B),
]


@pytest.mark.parametrize(
    ("records", "run"), [row[1:] for row in RECORDS], ids=[row[0] for row in RECORDS]
)
def test_the_holder_is_what_the_records_say(records: list[Pointer | None], run: str | None) -> None:
    holder = Holder()
    for record in records:
        if record is None:
            holder.withdraw()
        else:
            assert holder.take(record) is (holder.run == record.run)
    assert holder.run == run


def test_the_newest_pointer_of_the_holder_is_kept_whatever_the_order_of_its_pointers() -> None:
    holder = Holder()
    for rank in ((2, 5), (3, 1), (2, 9)):
        assert holder.take(pointer(A, rank))
    assert holder.pointer == pointer(A, (3, 1))


def test_runs_that_were_replaced_or_passed_over_never_hold_the_name_again() -> None:
    holder = Holder()
    for each in (pointer(A), pointer(B, replaces=(A,)), pointer(C)):
        holder.take(each)
    assert holder.never_again() == (A, C)
    holder.withdraw()
    assert holder.never_again() == ()


# -- a run on the topic --------------------------------------------------------------------------


def seen_by(topic: MemoryTopic, run: str, **options: Any) -> SnapshotTopic:
    options = {"sink": topic, "reader": topic.reader(), "name": "default", **options}
    return SnapshotTopic("snapshots", run=run, **options)


def test_a_name_that_another_run_holds_is_refused_with_its_snapshot_and_both_ways_out() -> None:
    topic = topic_of(pointer(A, (1, 12)))
    with pytest.raises(NameHeld) as caught:
        seen_by(topic, B).check(ABOVE_ALL)
    assert caught.value.exit_code == ConfigError.exit_code == 3
    assert str(caught.value) == (
        f"model 'default' on topic 'snapshots' is run {A}, whose newest snapshot is "
        f"00000012-20250101T101500Z of 2025-01-01T10:15:00Z; this is run {B}. Either publish under "
        "another name with -X snapshots.model_name=NAME, or replace that run, which then ends: "
        f"--replace-run {A}"
    )
    seen_by(topic, A).check(ABOVE_ALL)
    seen_by(topic, B, name="other").check(ABOVE_ALL)
    assert pointers_on(topic) == [pointer(A, (1, 12))]


@pytest.mark.parametrize("told", [B, C], ids=["the holder", "another"])
def test_a_replaced_run_is_refused_although_it_is_told_to_replace(told: str) -> None:
    topic = topic_of(pointer(A), pointer(B, replaces=(A,)))
    with pytest.raises(NameHeld, match=rf"{A}, is not .* any more: that is run {B}.*new state"):
        seen_by(topic, A, replace_run=told).check(ABOVE_ALL)


def test_only_the_run_that_was_named_is_replaced() -> None:
    topic = topic_of(pointer(A))
    on_topic = seen_by(topic, B, replace_run=A)
    on_topic.check(ABOVE_ALL)
    on_topic.send(pointer(B), ABOVE_ALL)
    assert pointers_on(topic)[-1] == pointer(B, replaces=(A,))
    with pytest.raises(NameHeld):
        seen_by(topic, C, replace_run=A).check(ABOVE_ALL)
    third = seen_by(topic, C, replace_run=B)
    third.check(ABOVE_ALL)
    third.send(pointer(C), ABOVE_ALL)
    assert pointers_on(topic)[-1] == pointer(C, replaces=(A, B))


def test_a_pointer_that_came_too_late_is_taken_back() -> None:
    topic = MemoryTopic()
    first, second = (seen_by(topic, run) for run in (A, B))
    for on_topic in (first, second):
        on_topic.check(ABOVE_ALL)
    first.send(pointer(A), ABOVE_ALL)
    with pytest.raises(NameHeld):
        second.send(pointer(B), ABOVE_ALL)
    assert pointers_on(topic) == [pointer(A), pointer(B), pointer(A)]


def test_a_run_that_was_passed_over_and_killed_is_named_in_the_next_pointer() -> None:
    """So a compacted topic leads to the holder again, although it kept the other's pointer."""
    topic = topic_of(pointer(A))
    holding = seen_by(topic, A)
    holding.check(ABOVE_ALL)
    topic.append("default", encode_pointer(pointer(B)))  # and then it is killed
    topic.compact()
    holding.check(ABOVE_ALL)
    holding.send(pointer(A, (1, 2)), ABOVE_ALL)
    assert pointers_on(topic) == [pointer(B), pointer(A, (1, 2), replaces=(B,))]
    holder = Holder()
    for each in pointers_on(topic):
        assert each
        holder.take(each)
    assert holder.run == A


def test_a_pointer_of_a_newer_version_is_never_replaced_and_an_older_one_is() -> None:
    newer, older = (
        sealed(json.loads(encode_pointer(pointer(A))) | {"format": format})
        for format in (FORMAT + 1, FORMAT - 1)
    )
    for values in ([newer], [pointer(B), newer], [older, newer]):
        with pytest.raises(NewerFormat, match=rf"'default' on topic .* format {FORMAT + 1}"):
            seen_by(topic_of(*values), B).check(ABOVE_ALL)
    passed_over: list[list[Pointer | bytes | None]] = [
        [older],
        [b"{}"],
        [newer, None],
        [newer, pointer(B)],
    ]
    for records in passed_over:
        seen_by(topic_of(*records), B).check(ABOVE_ALL)


# -- state directories ---------------------------------------------------------------------------


def publisher(directory: Path, topic: MemoryTopic, lease: Lease, **options: Any) -> Publisher:
    on_topic = seen_by(topic, lease.run, **options)
    return Publisher(directory, lease=lease, unavailable=(Away,), snapshot_topic=on_topic)


def publish(of: Publisher, lease: Lease, sequence: int) -> None:
    root = lease.directory / "snapshots"
    path = write_snapshot(root, run=lease.run, epoch=lease.epoch, sequence=sequence)
    of.publish(path, snapshot.verify(path))


def test_a_refused_publication_leaves_latest_json_as_it_was_and_the_snapshot_too(
    tmp_path: Path,
) -> None:
    topic = MemoryTopic()
    with Lease(tmp_path) as lease:
        of = publisher(tmp_path, topic, lease)
        publish(of, lease, 1)
        before = read_pointer(tmp_path / "latest.json")
        topic.append("default", encode_pointer(pointer(B, replaces=(lease.run,))))
        with pytest.raises(NameHeld, match=f"that is run {B}"):
            publish(of, lease, 2)
        assert read_pointer(tmp_path / "latest.json") == before
        assert len(snapshot.snapshot_ids(tmp_path / "snapshots")) == 2
        with pytest.raises(NameHeld):
            publisher(tmp_path, topic, lease).require_name(take_over=True)


def test_a_broker_that_is_away_delays_a_pointer_and_the_name_is_checked_before_it_is_sent(
    tmp_path: Path,
) -> None:
    topic = MemoryTopic()
    with Lease(tmp_path) as lease:
        of = publisher(tmp_path, topic, lease)
        topic.away = True
        with pytest.raises(Away):
            of.require_name()
        publish(of, lease, 1)
        with pytest.raises(BrokerError, match="did not reach topic 'snapshots'"):
            of.flush()
        assert pointers_on(topic) == []
        topic.append("default", encode_pointer(pointer(B)))
        topic.away = False
        with pytest.raises(NameHeld):
            of.flush()
        assert pointers_on(topic) == [pointer(B)]


def test_a_copy_of_a_directory_that_is_behind_needs_to_take_over(tmp_path: Path) -> None:
    topic = MemoryTopic()
    with Lease(tmp_path) as lease:
        of = publisher(tmp_path, topic, lease)
        publish(of, lease, 1)
        (tmp_path / "latest.json").rename(tmp_path / "backup")
        lease.raise_epoch(7)
        publish(of, lease, 2)
        (tmp_path / "backup").rename(tmp_path / "latest.json")
    with Lease(tmp_path) as lease:
        lease.epoch = 2  # as if the newer snapshots were not there
        of = publisher(tmp_path, topic, lease)
        with pytest.raises(CopyAhead, match=r"00000002-.*is an older copy.*--take-over"):
            of.require_name()
        of.require_name(take_over=True)
        assert lease.epoch == 9
        publish(of, lease, 3)
        assert [found.rank for found in pointers_on(topic) if found] == [(1, 1), (8, 2), (9, 3)]


def test_a_rollback_keeps_the_run_and_is_refused_while_another_run_holds_the_name(
    tmp_path: Path,
) -> None:
    topic = MemoryTopic()
    with Lease(tmp_path) as lease:
        running = publisher(tmp_path, topic, lease)
        publish(running, lease, 1)
        publish(running, lease, 2)
        first = tmp_path / "snapshots" / snapshot.snapshot_ids(tmp_path / "snapshots")[0]
        apart = Publisher(tmp_path, snapshot_topic=seen_by(topic, lease.run))
        rolled_back = apart.roll_back(first, snapshot.verify(first))
        assert (rolled_back.run, rolled_back.rank) == (lease.run, (lease.epoch + 1, 1))
        assert pointers_on(topic)[-1] == rolled_back
        publish(running, lease, 3)  # the run knows of the rollback, and goes on above it
        topic.append("default", encode_pointer(pointer(B, replaces=(lease.run,))))
        before = read_pointer(tmp_path / "latest.json")
        with pytest.raises(NameHeld):
            apart.roll_back(first, snapshot.verify(first))
        assert read_pointer(tmp_path / "latest.json") == before


# -- interleavings -------------------------------------------------------------------------------


class Trainer:
    """A process of a run: it looks at the topic, and later sends the next pointer."""

    def __init__(self, topic: MemoryTopic, run: str, epoch: int, replace_run: str | None) -> None:
        self.run = run
        self.rank = (epoch, 0)
        self.on_topic = seen_by(topic, run, replace_run=replace_run)
        self.looked = False

    def look(self) -> None:
        self.on_topic.check(self.rank)
        self.looked = True

    def next_pointer(self) -> Pointer:
        self.rank = (self.rank[0], self.rank[1] + 1)
        self.looked = False
        return pointer(self.run, self.rank)


class Runs(RuleBasedStateMachine):
    """Three runs, whose processes start, look, send, are told to replace, and are killed.

    Whoever reads the topic from its beginning agrees on the holder, and it changes only when an
    operator told a run to replace it, or withdrew it.
    """

    @initialize()
    def begin(self) -> None:
        self.topic = MemoryTopic()
        self.trainers: dict[str, Trainer] = {}
        self.epochs = dict.fromkeys((A, B, C), 0)
        self.told: set[tuple[str, str]] = set()
        self.replaced: set[str] = set()
        self.holder: str | None = None
        self.followers: list[tuple[Holder, Any]] = []

    @rule(run=st.sampled_from((A, B, C)), replaced=st.sampled_from((None, A, B, C)))
    def start(self, run: str, replaced: str | None) -> None:
        self.trainers.pop(run, None)
        self.epochs[run] += 1
        trainer = Trainer(self.topic, run, self.epochs[run], replaced)
        if replaced:
            self.told.add((run, replaced))
        self.attempt(trainer, trainer.look)
        if trainer.looked:
            self.trainers[run] = trainer

    @precondition(lambda self: self.trainers)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        trainer = data.draw(st.sampled_from([*self.trainers.values()]))
        self.attempt(trainer, trainer.look)

    @precondition(lambda self: any(trainer.looked for trainer in self.trainers.values()))
    @rule(data=st.data(), killed=st.booleans())
    def send(self, data: st.DataObject, killed: bool) -> None:
        """Send what was decided on when the run looked, however long ago that was."""
        looked = [trainer for trainer in self.trainers.values() if trainer.looked]
        trainer = data.draw(st.sampled_from(looked))
        made = trainer.next_pointer()
        if killed:
            made = structs.replace(made, replaces=trainer.on_topic.replaces)
            self.topic.append("default", encode_pointer(made))
            del self.trainers[trainer.run]
        else:
            self.attempt(trainer, lambda: trainer.on_topic.send(made, trainer.rank))

    @rule()
    def withdraw(self) -> None:
        self.topic.append("default", None)
        self.holder = None
        self.replaced.clear()

    @precondition(lambda self: self.last() in (None, self.holder))
    @rule()
    def compact(self) -> None:
        """Not while a killed run's late pointer is the last: see the page on serving."""
        self.topic.compact()

    def attempt(self, trainer: Trainer, work: Callable[[], None]) -> None:
        try:
            work()
        except NameHeld:
            assert self.read().run != trainer.run  # only the holder goes on
            self.trainers.pop(trainer.run, None)
        else:
            assert self.read().run in (None, trainer.run) or trainer.on_topic.replaces

    def read(self) -> Holder:
        holder = Holder()
        for each in pointers_on(self.topic):
            if each:
                holder.take(each)
            else:
                holder.withdraw()
        return holder

    def last(self) -> str | None:
        found = pointers_on(self.topic)
        return found[-1].run if found and found[-1] else None

    @invariant()
    def the_holder_changes_only_when_someone_is_told(self) -> None:
        now = self.read().run
        if now != self.holder:
            if self.holder is not None:
                assert now is not None
                assert (now, self.holder) in self.told
                self.replaced.add(self.holder)
            assert now not in self.replaced
            self.holder = now

    def teardown(self) -> None:
        """When all that live have looked once more, one is left at most, and it holds the name."""
        for trainer in [*self.trainers.values()]:
            self.attempt(trainer, trainer.look)
            if trainer.run in self.trainers and trainer.run == self.holder:
                trainer.on_topic.send(trainer.next_pointer(), trainer.rank)
        holder = self.read().run
        if holder in self.trainers:
            self.topic.compact()
            assert self.read().run == self.last() == holder


def test_any_interleaving_of_runs_leaves_one_holder() -> None:
    run_state_machine_as_test(Runs, settings=settings(max_examples=80, stateful_step_count=25))


def test_the_tables_of_the_module_are_those_of_the_design() -> None:
    """The protocol stands in the module and on the page in the same words."""
    from stream_ctr.snapshots import snapshot_topic

    page = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    for line in (snapshot_topic.__doc__ or "").splitlines():
        cells = [cell for cell in re.split(r"\s{2,}", line.strip()) if cell]
        if line.startswith("    ") and len(cells) == 3 and not set(line) <= set(" -"):
            assert f"| {' | '.join(cells)} |" in page, line
