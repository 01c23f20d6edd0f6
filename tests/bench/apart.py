"""What it would cost to decode Arrow records in a process of its own.

    python tests/bench/apart.py

A crash of Arrow on hostile bytes would then end that process, and not the trainer. The process gets
the records of a poll through a pipe, decodes and hashes them, and returns ids and times. Both sides
move bytes in Arrow's IPC format, without a copy on reading. The table compares seconds of CPU of
all processes, which other programs on the machine change little, and the time that a poll takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.record import machine, print_table  # noqa: E402

from stream_ctr.events.arrow_events import pack  # noqa: E402
from stream_ctr.events.decoder import Decoder  # noqa: E402
from stream_ctr.events.features import Hasher, hash_ids  # noqa: E402
from stream_ctr.events.field import Field  # noqa: E402
from stream_ctr.events.json_events import encode_impressions  # noqa: E402

EVENTS = 20_000
T = 1_735_689_600_000
FIELDS = (
    *(Field(f"c{index}", "categorical") for index in range(26)),
    *(Field(f"n{index}", "numeric") for index in range(13)),
)


def poll(events_a_record: int) -> pa.LargeBinaryArray:
    """Return Arrow records of impressions with 39 fields."""
    rng = np.random.default_rng(0)
    features = {
        field.name: pa.array(rng.zipf(1.3, EVENTS) % 10_000).cast(pa.string())
        if field.kind == "categorical"
        else pa.array(rng.lognormal(size=EVENTS))
        for field in FIELDS
    }
    ids = pa.array([f"{number:016x}" for number in rng.integers(0, 1 << 62, EVENTS)])
    records = encode_impressions(ids, T + np.arange(EVENTS), features)
    return pack(records, events_a_record=events_a_record)


class Here:
    """Decode and hash in this process."""

    def __init__(self) -> None:
        self._decoder = Decoder(FIELDS)
        self._hasher = Hasher(FIELDS, table_bits=22)

    def read(self, values: pa.LargeBinaryArray) -> pa.RecordBatch:
        """Return the hash of the id, the time and the rows of each impression."""
        events, _ = self._decoder.decode(values)
        ids, _ = self._hasher.rows(events.impressions.features)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), ids.shape[1])
        columns = [pa.array(hash_ids(events.impressions.impression_id)), events.impressions.time]
        return pa.RecordBatch.from_arrays([*map(pa.array, columns), rows], ["id", "time", "rows"])


class Apart:
    """Decode and hash in a process of its own."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,), daemon=True)
        self._process.start()

    def read(self, values: pa.LargeBinaryArray) -> pa.RecordBatch:
        send(self._pipe, pa.RecordBatch.from_arrays([values], ["value"]))
        return receive(self._pipe)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process. Linux only."""
        return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[0]) / 1e9

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def serve(pipe: Connection) -> None:
    here = Here()
    while True:
        send(pipe, here.read(receive(pipe).column(0)))


def send(pipe: Connection, batch: pa.RecordBatch) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    pipe.send_bytes(memoryview(sink.getvalue()))


def receive(pipe: Connection) -> pa.RecordBatch:
    with pa.ipc.open_stream(pa.py_buffer(pipe.recv_bytes())) as reader:
        return reader.read_next_batch()


class Cost(NamedTuple):
    """CPU and elapsed time of an event in ns, medians over the polls."""

    cpu: float
    elapsed: float


def measure(values: pa.LargeBinaryArray, here: Here, apart: Apart, rounds: int) -> list[Cost]:
    """Return the costs here and apart, which take turns."""
    assert here.read(values).equals(apart.read(values))
    ways = [
        (here.read, time.process_time),
        (apart.read, lambda: time.process_time() + apart.cpu_seconds()),
    ]
    found: list[list[Cost]] = [[], []]
    for _ in range(rounds):
        for costs, (read, cpu_seconds) in zip(found, ways, strict=True):
            cpu, started = cpu_seconds(), time.perf_counter()
            read(values)
            elapsed = time.perf_counter() - started
            costs.append(Cost(1e9 * (cpu_seconds() - cpu) / EVENTS, 1e9 * elapsed / EVENTS))
    return [Cost(*map(statistics.median, zip(*costs, strict=True))) for costs in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    apart = Apart()
    here = Here()
    rows: list[list[object]] = []
    try:
        for events_a_record in (10, 100, 1000):
            values = poll(events_a_record)
            mib = values.nbytes / (1 << 20)
            own, both = measure(values, here, apart, rounds)
            cost = f"{100 * (both.cpu / own.cpu - 1):+.0f} %"
            shown = (f"{number:,.0f}" for number in (*own, *both))
            rows.append([events_a_record, f"{mib:.1f}", *shown, cost])
    finally:
        apart.close()
    print_table(
        [
            *("events a record", "MiB a poll", "here: CPU ns an event", "elapsed ns"),
            *("apart: CPU ns an event", "elapsed ns", "CPU"),
        ],
        rows,
    )
    print(f"{machine()}: python tests/bench/apart.py")


if __name__ == "__main__":
    main()
