"""The time of each part of a delta, from the touched rows to the rows that serve.

    gather      the touched rows of the table, and the dense parameters, copied by the learner
    serialise   the copy as a payload
    digest      SHA-256 of the payload
    sign        the header with its seal and its signature
    write       header and payload into a directory, on the disk
    verify      the header's seal and signature, and SHA-256 of the payload
    decode      the payload to arrays
    apply       a new model with these rows, which is served from then on
    absorb      these rows in the shared table

DeepFM (K=10, 400-400-400) of 39 fields over 2^--bits rows. Its touched rows lie anywhere in the
table. The medians of --repetitions deltas count, of --rows rows each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from support.keys import write_keys
from support.record import formatted

from bench import zipf
from bench.delta_base import random_rows
from bench.delta_chain_writer import ChainWriter
from stream_ctr.learn.learner import make_learner
from stream_ctr.learn.runtimes import make_predictor
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.snapshots.delta import Precision, decode_payload, encode_payload, verified
from stream_ctr.snapshots.delta_store import DeltaStore
from stream_ctr.snapshots.signing import SigningKey

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
PARTS = (
    *("gather", "serialise", "digest", "sign", "write"),
    *("verify", "decode", "apply", "absorb"),
)
Result = dict[str, Any]
T = TypeVar("T")


class Timed:
    """Seconds of each part, a list of repetitions."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, part: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        self.seconds[part].append(time.perf_counter() - began)
        return result


class Way:
    """The way of deltas from a learner to a served model, both with 2 ** `bits` rows."""

    def __init__(self, bits: int, directory: Path) -> None:
        spec = LearnerSpec(fields=zipf.FIELDS, table_bits=bits, batch_size=256)
        self.bits = bits
        self.directory = directory
        self.learner = make_learner(spec, device="cpu")
        self.learner.track_touched()
        self.model = make_predictor(spec, self.learner.weights(), runtime="torch")
        self.key = SigningKey(write_keys(directory, "trainer")[0])

    def touch(self, rng: np.random.Generator, rows: int) -> None:
        """Touch so many distinct rows."""
        assert self.learner.touched is not None
        self.learner.touched.put_back(random_rows(rng, self.bits, rows))

    def send(self, timed: Timed, writer: ChainWriter, store: DeltaStore) -> int:
        """Send one delta, and return the size of its payload."""
        precision = writer.precision
        changes = {"model": timed("gather", self.learner.take_changes)}
        payload = timed("serialise", partial(encode_payload, changes, precision))
        sha256 = timed("digest", partial(writer.sha256, payload))
        link = timed("sign", partial(writer.link, changes, payload, sha256))
        timed("write", partial(store.write, link.data, link.header, payload))
        verify = partial(verified, link.data, payload, signature=self.key.verify)
        timed("verify", verify)
        arrays = timed("decode", partial(decode_payload, payload, precision))
        self.model = timed("apply", partial(self.model.updated, arrays["model"]))
        if not timed("absorb", self.model.absorb):
            raise RuntimeError("an older model is still alive")
        return len(payload)

    def repeat(self, precision: Precision, repetitions: int, rows: int) -> tuple[Timed, int]:
        """Send deltas; return the seconds of all but the first, which compiles, and their size."""
        rng = np.random.default_rng(0)
        store = DeltaStore(self.directory / precision)
        writer = ChainWriter.unattached(precision=precision, sign=self.key.sign)
        self.touch(rng, rows)
        self.send(Timed(), writer, store)
        timed = Timed()
        for _ in range(repetitions):
            self.touch(rng, rows)
            size = self.send(timed, writer, store)
        return timed, size


def measure(options: argparse.Namespace) -> Result:
    """Return the seconds of each part, for each precision."""
    bits = options.bits[-1]
    found: Result = {"bits": bits, "rows": options.rows, "parts": {}, "bytes": {}}
    with tempfile.TemporaryDirectory() as name:
        way = Way(bits, Path(name))
        for precision in PRECISIONS:
            timed, size = way.repeat(precision, options.repetitions, options.rows)
            found["parts"][precision] = dict(timed.seconds)
            found["bytes"][precision] = size
    return found


def table(results: Result) -> str:
    """Return the table of the medians in milliseconds."""
    rows: list[list[object]] = []
    for part in PARTS:
        medians = [statistics.median(results["parts"][precision][part]) for precision in PRECISIONS]
        rows.append([part, *(f"{1000 * seconds:.0f}" for seconds in medians)])
    total = [
        sum(statistics.median(results["parts"][precision][part]) for part in PARTS)
        for precision in PRECISIONS
    ]
    rows.append(["all", *(f"{1000 * seconds:.0f}" for seconds in total)])
    rows.append(["payload, MB", *(f"{results['bytes'][name] / 1e6:.1f}" for name in PRECISIONS)])
    header = [f"{results['rows']:,} of 2^{results['bits']} rows", "fp32, ms", "bf16, ms"]
    return formatted(header, rows)
