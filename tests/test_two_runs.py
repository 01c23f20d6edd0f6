"""Two runs, one topic: every order of starts, and what each subscriber then serves.

The table in docs/serving.md is what these orders give. After a change write it again with

    make lineage
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import pytest
from msgspec import structs
from support.memory_topic import MemoryTopic
from support.patience import PATIENCE_SECONDS
from support.record import ROOT, fill, formatted
from support.served import write_served

from stream_ctr.connectors import kafka
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.lease import Lease
from stream_ctr.snapshots.lineage import run_of
from stream_ctr.snapshots.pointer_sources import TopicPointers
from stream_ctr.snapshots.publisher import Publisher
from stream_ctr.snapshots.snapshot_topic import CopyAhead, NameHeld, Record, Sink, SnapshotTopic
from stream_ctr.snapshots.subscriber import Follow, Subscriber

PAGE = ROOT / "docs" / "serving.md"
BLOCK = "two runs"
HEADER = [
    "in this order",
    "then the runs",
    "fresh",
    "fresh, compacted topic",
    "began with the first",
    "the same, `--follow replace`",
    "fresh, `--run` A",
]
REPLACED = ("A starts", "A publishes", "B starts, may replace A", "B publishes")
FOLLOWS: tuple[Follow, ...] = ("never", "replace")
COPY = "'s copy"
BOTH_REPLACE = ("B starts, may replace A", "C starts, may replace A")
ORDERS = [
    ["A starts", "A publishes"],
    ["A starts", "A publishes", "B starts"],
    ["A starts", "A publishes", "B starts", "A publishes"],
    ["A starts", "B starts", "A publishes", "B publishes"],
    ["A starts", "B starts", "B publishes", "A publishes"],
    ["A starts", "B starts", "A publishes", "B publishes, late"],
    ["A starts", "B starts", "A publishes", "B publishes, late", "A publishes"],
    [*REPLACED],
    [*REPLACED, "B publishes"],
    [*REPLACED, "A publishes"],
    [*REPLACED, "A publishes, late"],
    [*REPLACED, "A publishes, late, killed"],
    [*REPLACED, "A publishes, late, killed", "B publishes"],
    [*REPLACED, "A starts"],
    [*REPLACED, "A starts, may replace B"],
    [*REPLACED, "B starts", "B publishes"],
    [*REPLACED, "C starts, may replace A"],
    [*REPLACED, "C starts, may replace B", "C publishes"],
    ["A starts", "A publishes", *BOTH_REPLACE, "B publishes", "C publishes"],
    ["A starts", "A publishes", *BOTH_REPLACE, "B publishes", "C publishes, late"],
    ["A starts", "A publishes", "B starts, may replace A", "B killed", "A publishes"],
    ["A starts", "A publishes", "withdrawn"],
    ["A starts", "A publishes", "withdrawn", "B starts", "B publishes"],
    ["A starts", "A publishes", "withdrawn", "B starts", "B publishes", "A publishes"],
    ["A starts", "A publishes", "A publishes", "A rolls back"],
    ["A starts", "A publishes", "A publishes", "A rolls back", "A publishes"],
    ["A starts", "A publishes", "A's copy starts", "A's copy publishes", "A publishes"],
    ["A starts", "A is copied", "A publishes", "A's copy starts"],
    ["A starts", "A is copied", "A publishes", "A's copy takes over", "A's copy publishes"],
]


class Log(Protocol):
    """A snapshot topic: its sink, and readers from its beginning."""

    @property
    def sink(self) -> Sink: ...

    def withdraw(self, topic: str, name: str) -> None: ...

    def reader(self) -> View: ...


class View:
    """A reader from the beginning of the topic; while `blind`, it finds nothing new."""

    def __init__(self, read: Callable[[], Sequence[Record]]) -> None:
        self._read = read
        self._position = 0
        self.blind = False
        self.caught_up = True

    def read_to_end(self) -> Sequence[Record]:
        if self.blind:
            return []
        found = self._read()[self._position :]
        self._position += len(found)
        return found

    def poll(self, timeout_seconds: float) -> Sequence[Record]:
        return self.read_to_end()


class BrokerLog:
    """A topic of a broker, which one consumer reads for all."""

    def __init__(self, sink: kafka.KafkaSink, reader: kafka.PointerReader) -> None:
        self.sink = sink
        self._reader = reader
        self._records: list[Record] = []

    def withdraw(self, topic: str, name: str) -> None:
        self.sink.send(topic, None, key=name.encode())
        self.sink.flush(PATIENCE_SECONDS)

    def _read(self) -> list[Record]:
        self._records += self._reader.read_to_end()
        return self._records

    def reader(self) -> View:
        return View(self._read)


class MemoryLog:
    """The same in memory."""

    def __init__(self) -> None:
        self.sink = MemoryTopic()

    def withdraw(self, topic: str, name: str) -> None:
        self.sink.append(name, None)

    def reader(self) -> View:
        return View(lambda: [record for _, record in self.sink.records])


class _Killed(Exception):
    """The process is gone."""


class _Sink:
    """The sink of one run. After its record is sent, the run sees the topic, or is killed."""

    def __init__(self, sink: Sink, view: View) -> None:
        self._sink = sink
        self._view = view
        self.killed = False

    def send(self, topic: str, value: bytes, *, key: bytes | None = None, **_: object) -> None:
        self._sink.send(topic, value, key=key)

    def flush(self, timeout_seconds: float) -> None:
        self._sink.flush(timeout_seconds)
        self._view.blind = False
        if self.killed:
            raise _Killed


class Process:
    """A run, from its start: its state directory, and the topic as the run sees it."""

    def __init__(
        self, log: Log, topic: str, name: str, directory: Path, *, replace_run: str | None = None
    ) -> None:
        self._directory = directory
        self._view = log.reader()
        self._sink = _Sink(log.sink, self._view)
        self.lease = Lease(directory)
        on_topic = SnapshotTopic(
            topic,
            sink=self._sink,
            reader=self._view,
            name=name,
            run=self.lease.run,
            replace_run=replace_run,
        )
        self.publisher = Publisher(directory, lease=self.lease, snapshot_topic=on_topic)

    def publish(self, *, late: bool, killed: bool) -> str:
        """Publish the next snapshot of the directory, and return its name.

        A `late` run has read the topic before the last pointer was there, and sends its own after
        it. One that is `killed` ends as soon as its pointer is sent.
        """
        root = self._directory / "snapshots"
        pointer = self.publisher.published()
        path = root / snapshot.snapshot_ids(root)[pointer.sequence if pointer else 0]
        self._view.blind = late
        self._sink.killed = killed
        manifest = structs.replace(snapshot.verify(path), epoch=self.lease.epoch)
        self.publisher.publish(path, manifest)
        return named(path)

    def roll_back(self) -> str:
        """Publish the first snapshot again."""
        root = self._directory / "snapshots"
        path = root / snapshot.snapshot_ids(root)[0]
        # As the command does it, in a process of its own.
        self.publisher.roll_back(path, snapshot.verify(path))
        return f"{named(path)} again"


def named(path: Path | str) -> str:
    """Return "A2" for the second snapshot of run A, and "A*2" for that of a copy of it."""
    path = Path(path)
    return f"{path.parents[1].name.replace(COPY, '*')}{int(path.name[:8])}"


class Order:
    """One order of starts, under a name of its own, in a directory of its own."""

    def __init__(self, log: Log, topic: str, name: str, states: Path, folder: Path) -> None:
        shutil.copytree(states, folder)
        self._log = log
        self._topic = topic
        self._name = name
        self._folder = folder
        self._processes: dict[str, Process] = {}
        self._following: dict[Follow, Subscriber] = {}

    def run(self, steps: Sequence[str]) -> list[str]:
        outcomes = []
        self._following = {follow: self._subscriber(follow) for follow in FOLLOWS}
        for step in steps:
            outcomes.append(self._do(step))
            for subscriber in self._following.values():
                subscriber.next(0.0)
        fresh = self._subscriber("never")
        compacted = self._subscriber("never", compacted=True)
        pinned = self._subscriber("never", run=run_of(self._folder / "A"))
        for subscriber in (fresh, compacted, pinned):
            subscriber.next(0.0)
        subscribers = [fresh, compacted, *self._following.values(), pinned]
        return [
            "; ".join(steps),
            ", ".join(outcome for outcome in outcomes if outcome != "-"),
            *[self._serves(subscriber) for subscriber in subscribers],
        ]

    def _do(self, step: str) -> str:
        """Do a step, and return what becomes of it."""
        if step == "withdrawn":
            self._log.withdraw(self._topic, self._name)
            return "the name is free"
        run = step[0] + (COPY if COPY in step else "")
        verb = step.removeprefix(run).strip()
        try:
            return self._try(run, verb)
        except NameHeld as error:
            self._end(run)
            ahead = ": a copy is ahead" if isinstance(error, CopyAhead) else ""
            return f"{run} {'ends' if verb.startswith('publishes') else 'is refused'}{ahead}"
        except _Killed:
            self._end(run)
            return "its pointer is sent"

    def _try(self, run: str, verb: str) -> str:
        if verb == "killed":
            self._end(run)
            return "nothing is sent"
        if verb == "is copied":
            shutil.copytree(self._folder / run, self._folder / f"{run}{COPY}")
            return "-"
        if verb.startswith(("starts", "takes over")):
            self._start(run, verb)
            return "-"
        if verb == "rolls back":
            return self._processes[run].roll_back()
        return self._processes[run].publish(late="late" in verb, killed="killed" in verb)

    def _start(self, run: str, verb: str) -> None:
        directory = self._folder / run
        if not directory.exists():
            shutil.copytree(self._folder / run[0], directory)
        _, _, replaced = verb.partition("may replace ")
        replace_run = run_of(self._folder / replaced) if replaced else None
        self._end(run)
        process = Process(self._log, self._topic, self._name, directory, replace_run=replace_run)
        self._processes[run] = process
        process.publisher.require_name(take_over=verb == "takes over")

    def _end(self, run: str) -> None:
        if process := self._processes.pop(run, None):
            process.lease.close()

    def end(self) -> None:
        for run in [*self._processes]:
            self._end(run)

    def _subscriber(
        self, follow: Follow, *, run: str | None = None, compacted: bool = False
    ) -> Subscriber:
        view = self._log.reader()
        if compacted:
            last = self._last(view)
            view = View(lambda: last)
        pointers = TopicPointers(view, model_name=self._name)
        return Subscriber(pointers, run=run, follow=follow)

    def _last(self, view: View) -> list[Record]:
        """Return what compaction leaves of the name."""
        records = [record for record in view.read_to_end() if record[0] == self._name]
        return [record for record in records[-1:] if record[1] is not None]

    @staticmethod
    def _serves(subscriber: Subscriber) -> str:
        return named(subscriber.pointer.path) if subscriber.pointer else "nothing"


def table(log: Log, topic: str, folder: Path) -> str:
    """Return the table of all orders, which are run on this topic."""
    states = folder / "states"
    for seed, run in enumerate("ABC"):
        state = states / run
        for sequence in (1, 2, 3):
            write_served(state / "snapshots", seed=seed, sequence=sequence, run=f"{seed:032x}")
        run_of(state)
    rows: list[list[object]] = []
    for number, steps in enumerate(ORDERS):
        order = Order(log, topic, f"model-{number}", states, folder / str(number))
        rows.append([*order.run(steps)])
        order.end()
    return formatted(HEADER, rows)


def in_memory(folder: Path) -> str:
    return table(MemoryLog(), "snapshots", folder)


@contextmanager
def topic_of_broker(servers: str, topic: str) -> Iterator[BrokerLog]:
    client = kafka.client_options(servers, {})
    kafka.ensure_topic(client, topic, compacted=True)
    with (
        closing(kafka.KafkaSink(client)) as sink,
        closing(kafka.PointerReader(client, topic)) as reader,
    ):
        yield BrokerLog(sink, reader)


@pytest.mark.slow
def test_every_order_of_starts_serves_what_the_page_says(
    broker: str, topic: str, tmp_path: Path
) -> None:
    with topic_of_broker(broker, topic) as log:
        found = table(log, topic, tmp_path)
    page = PAGE.read_text()
    assert fill(page, BLOCK, found) == page, "write it again with: make lineage"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        written = in_memory(Path(temporary))
    PAGE.write_text(fill(PAGE.read_text(), BLOCK, written))
    sys.stdout.write(f"{written}\n")
