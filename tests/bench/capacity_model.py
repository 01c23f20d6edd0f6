"""What tables and streams need of memory, network, processors and disks: the formulas.

    B  examples of a batch            N  ranks          r  examples of a rank, those of its parts
    F  fields                         P  parameters of the dense part, float32
    R  floats of a row in use         D(n)  distinct rows of n examples (delta_sizes.Law)

A step sends, in bytes

    examples                rank 0 -> rank            (4 F + 1) r
    numbers of its rows     rank -> each owner        4 D(r) / N
    these rows              owner -> rank             (4 R + 2) D(r) / N       2: online only
    online: a row stepped   rank -> the next one that has it, the last one -> its owner     4 R
    adagrad, adam           rank -> each owner        (4 + 4 (K + 1)) F r / N  gradients of entries
    dense gradients         rank -> each owner        4 P / N for each part
    new parameters          owner -> each rank        4 P / N
    logits                  rank -> rank 0            8 r online, else 4 r

Rows that both of two sets of a and b examples have, and m examples between them have not, number
D(m + a) + D(m + b) - D(m) - D(m + a + b). Before a step come the events of its examples: an
impression of 4 F + 44 bytes and a click of 36 to the rank that joins them, an example of 4 F + 45
to rank 0. `bytes_of_step` adds what is small: commands, numbers of rows, ends of turns. Nothing
here is measured; capacity.py gives the formulas what was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench import delta_sizes, zipf
from stream_ctr.learn.batch_shares import shares_of
from stream_ctr.learn.cpu_step import parts_of
from stream_ctr.learn.pairs import choose_columns
from stream_ctr.learn.spec import LARGEST_PAIR_BITS, LearnerSpec
from stream_ctr.learn.step import SUB_BATCH
from stream_ctr.learn.step_bytes import StepShape, bytes_a_step
from stream_ctr.learn.table_kernels import floats_in_use, row_floats

RATED = 7
"""The first so many `resources` are examples or events a second; the others are bytes."""
RANKS = (1, 2, 4, 8, 16, 32, 64)
USUAL_BATCH = 4096
PART_ROWS = 1024
MOST_PARTS = len(parts_of(1 << 24))

FLOAT = 4
ROW_NUMBER = 4
LABEL = 1
LOGIT = 8
NEIGHBOURS = 2  # the ranks that have a row before and after
IMPRESSION = 44  # beside the ids of its features
CLICK = 36
RELEASED = 45  # a joined example, beside the ids of its features
PAIR = 16  # (z, n) of FTRL, float64
EXPERTS_OVER_FIELDS = 2
EXPERTS_OVER_PAIRS = 2

SNAPSHOT_SECONDS = 600.0
SNAPSHOTS_KEPT = 3
DELTA_SECONDS = 5.0
WAITING_SECONDS = 630.0  # label window and lateness
JOIN_BYTES = 1e9  # join.max_memory; what is beyond it is on disk

Distinct = Callable[[float], float]
"""Maps a number of examples to the distinct rows that they have."""


# -- sizes -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """DeepFM of `fields` fields over a table of rows.

    >>> model = Model()
    >>> model.row_bytes, model.floats, model.parameters
    (64, 13, 477601)
    """

    fields: int = zipf.FIELDS
    embedding_dim: int = 10
    hidden: tuple[int, ...] = (400, 400, 400)
    optimizer: str = "online"

    @property
    def row_bytes(self) -> int:
        """The bytes of a row in memory and in a snapshot."""
        floats = row_floats(self.embedding_dim, embeddings=1, optimizer=self.optimizer)
        return FLOAT * floats

    @property
    def floats(self) -> int:
        """The floats of a row that hold V, w and the optimiser's state; others are padding."""
        return floats_in_use(self.embedding_dim, 1, self.optimizer)

    @property
    def parameters(self) -> int:
        """The parameters of the dense part."""
        spec = LearnerSpec(fields=self.fields, embedding_dim=self.embedding_dim, hidden=self.hidden)
        return delta_sizes.dense_bytes(spec) // FLOAT - 1  # without the intercept


def expert_bytes(rows: int) -> int:
    """Return the bytes of the FTRL experts of the default blend, which rank 0 holds whole.

    >>> expert_bytes(1 << 20) == (2 * 2**20 + 2 * 2**22) * 16
    True
    """
    pairs = min(4 * rows, 1 << LARGEST_PAIR_BITS)
    return PAIR * (EXPERTS_OVER_FIELDS * rows + EXPERTS_OVER_PAIRS * pairs)


def memory_bytes(model: Model, rows: int, ranks: int) -> tuple[float, float]:
    """Return the bytes of a rank, and those of rank 0, while a snapshot is written.

    A cut copies a rank's rows, and on rank 0 the experts too.

    >>> memory_bytes(Model(), 1 << 20, 4) == (2 * 2**24, 2 * 2**24 + 2 * expert_bytes(1 << 20))
    True
    """
    own = 2.0 * model.row_bytes * rows / ranks
    return own, own + 2.0 * expert_bytes(rows)


def snapshot_bytes(model: Model, rows: int) -> float:
    """Return the bytes of the tables of a snapshot; the dense part is small beside them."""
    return float(model.row_bytes * rows + expert_bytes(rows))


def delta_bytes(model: Model, rows: int, examples: float, distinct: Distinct) -> float:
    """Return the bytes of a delta of the default blend after so many examples, at most.

    Each example is taken to have pairs that no other one has.
    """
    size = 4.0 * model.parameters
    tables = delta_sizes.tables(rows.bit_length() - 1, model.embedding_dim)
    for table, times in zip(tables, delta_sizes.TIMES, strict=True):
        columns = len(choose_columns(model.fields))
        touched = occupied(table.rows, columns * examples) if table.pairs else distinct(examples)
        size += times * table.bytes(touched, "fp32")
    return size


def occupied(rows: int, values: float) -> float:
    """Return the rows that so many distinct values are expected to hit, N (1 - (1 - 1/N)^D).

    >>> round(occupied(2, 1.0), 9), round(occupied(2, 2.0), 9)
    (1.0, 1.5)
    """
    return float(-rows * math.expm1(values * math.log1p(-1.0 / rows)))


# -- network ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traffic:
    """The bytes [N, N] of a step from rank i to rank j.

    `turns` has those of the messages with which a rank lets the next one begin its turn, `sent` all
    others.
    """

    sent: npt.NDArray[np.float64]
    turns: npt.NDArray[np.float64]

    @property
    def ranks(self) -> int:
        return len(self.sent)

    @property
    def total(self) -> float:
        """The bytes that all ranks send together."""
        return float((self.sent + self.turns).sum())

    @property
    def busiest(self) -> float:
        """The bytes that the busiest link carries in one direction."""
        return largest_sum(self.sent + self.turns)

    def seconds(self, link: float) -> float:
        """Return the seconds on links of so many bits a second.

        The messages between turns wait for each other, the others do not.
        """
        return 8.0 * (largest_sum(self.sent) + float(self.turns.sum())) / link


def largest_sum(sent: npt.NDArray[np.float64]) -> float:
    """Return the largest number of bytes that a rank sends or receives.

    >>> largest_sum(np.array([[0.0, 1.0], [2.0, 0.0]]))
    2.0
    """
    return float(max(sent.sum(axis=0).max(), sent.sum(axis=1).max()))


def examples_by_rank(batch: int, ranks: int) -> list[int]:
    """Return the examples of each rank: of C parts, rank r has [r C // N, (r + 1) C // N).

    >>> examples_by_rank(4096, 2), examples_by_rank(4096, 8)
    ([2048, 2048], [0, 1024, 0, 1024, 0, 1024, 0, 1024])
    """
    return [
        sum(min(part.stop, batch) - part.start for part in parts)
        for parts in parts_by_rank(batch, ranks)
    ]


def parts_by_rank(batch: int, ranks: int) -> list[list[slice]]:
    """Return the parts of a batch that each rank computes."""
    parts = parts_of(batch)
    edges = [rank * len(parts) // ranks for rank in range(ranks + 1)]
    return [parts[first:last] for first, last in zip(edges[:-1], edges[1:], strict=True)]


def traffic(model: Model, batch: int, ranks: int, distinct: Distinct) -> Traffic:
    """Return the bytes of a step of `batch` examples."""
    sent = np.zeros((ranks, ranks))
    turns = np.zeros((ranks, ranks))
    online = model.optimizer == "online"
    dense = FLOAT * model.parameters / ranks
    examples = examples_by_rank(batch, ranks)
    for rank, parts in enumerate(parts_by_rank(batch, ranks)):
        n = examples[rank]
        rows = distinct(n)
        row = FLOAT * model.floats + (NEIGHBOURS if online else 0)
        sent[0, rank] += n * (FLOAT * model.fields + LABEL)
        sent[rank, 0] += n * (LOGIT if online else FLOAT)
        sent[rank, :] += rows * ROW_NUMBER / ranks
        sent[:, rank] += rows * row / ranks
        sent[rank, :] += dense * (len(parts) + 1)
        if not online:
            entry = ROW_NUMBER + FLOAT * (model.embedding_dim + 1)
            sent[rank, :] += n * model.fields * entry / ranks
    if online:
        add_turns(sent, turns, model, examples, distinct)
    np.fill_diagonal(sent, 0.0)
    return Traffic(sent, turns)


def add_turns(
    sent: npt.NDArray[np.float64],
    turns: npt.NDArray[np.float64],
    model: Model,
    examples: Sequence[int],
    distinct: Distinct,
) -> None:
    """Add the rows that ranks pass on and give back at the end of their turns."""
    row = FLOAT * model.floats
    passed, given_back = passes(examples, distinct)
    active = [rank for rank, n in enumerate(examples) if n]
    for rank, following in itertools.pairwise(active):
        turns[rank, following] = row * passed[rank, following]
    sent += row * passed - turns
    sent += row * given_back[:, None] / len(examples)


def passes(
    examples: Sequence[int], distinct: Distinct
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the rows [N, N] that rank i passes to rank j, and those [N] that rank i has last.

    `examples` are those of the ranks.
    """
    passed = np.zeros((len(examples), len(examples)))
    given_back = np.zeros(len(examples))
    for rank, before in enumerate(examples):
        between = 0
        for following in range(rank + 1, len(examples)):
            after = examples[following]
            passed[rank, following] = passed_rows(distinct, before, between, after)
            between += after
        given_back[rank] = distinct(between + before) - distinct(between)
    return passed, given_back


def passed_rows(distinct: Distinct, before: float, between: float, after: float) -> float:
    """Return the rows of examples before and after which none between them has.

    >>> passed_rows(lambda n: min(n, 1), 5, 0, 5), passed_rows(lambda n: min(n, 1), 5, 1, 5)
    (1, 0)
    """
    return (
        distinct(between + before)
        + distinct(between + after)
        - distinct(between)
        - distinct(between + before + after)
    )


def bytes_of_step(model: Model, batch: int, ranks: int, distinct: Distinct) -> float:
    """Return the bytes that all ranks send in a step, by the formula of the learner itself."""
    online = model.optimizer == "online"
    shape = StepShape(
        columns=model.fields,
        width=model.embedding_dim,
        row_floats=model.floats,
        parameters=model.parameters,
        online=online,
    )
    shares = shares_of(batch, parts_of(batch), ranks=ranks, sub_batch=SUB_BATCH if online else None)
    elsewhere = (ranks - 1) / ranks
    fetched = elsewhere * sum(distinct(len(share.examples)) for share in shares)
    passed, given_back = passes([len(share.examples) for share in shares], distinct)
    moved = float(passed.sum() + elsewhere * given_back.sum())
    entries = elsewhere * batch * model.fields
    return bytes_a_step(shape, shares, fetched=fetched, passed=moved if online else entries)


def front_bytes(model: Model, examples: float, clicks: float, ranks: int) -> float:
    """Return the bytes of so many examples and clicks through rank 0's link, to be joined.

    Of the events, (N - 1) / N are read elsewhere than they are joined, and as many examples are
    joined elsewhere than on rank 0.

    >>> front_bytes(Model(fields=1), 1000, 100, ranks=2)
    37400.0
    """
    elsewhere = (ranks - 1) / ranks
    features = FLOAT * model.fields
    events = examples * (features + IMPRESSION) + clicks * CLICK
    return elsewhere * (events / ranks + examples * (features + RELEASED))


# -- rates -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Input:
    """A measured number, None if it was not measured, and its source."""

    name: str
    value: float | None
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class Inputs:
    """The measured numbers that the formulas take."""

    dense: Input
    turns: Input
    decode: Input
    join: Input
    ftrl: Input
    besides: Input
    """Examples a second of everything but the network, in one process."""
    waiting: Input
    events: Input
    """Events an example: clicks come to impressions."""
    cores: int
    """The cores of the machine that `dense` and `decode` were measured on."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a rank. `disk` is in bytes a second, `link` in bits a second."""

    cores: int = 2
    memory: float = 256 * 2.0**30
    disk: float = 1e9
    link: float = 1e10


@dataclass(frozen=True, slots=True)
class Stream:
    """So many `events` a second for a model whose table has `rows` rows."""

    rows: int
    events: float
    distinct: Distinct
    model: Model = Model()

    def examples(self, inputs: Inputs) -> float:
        """Return the examples a second."""
        return self.events / (inputs.events.value or 1.0)


@dataclass(frozen=True, slots=True)
class Resource:
    """What a stream needs of a resource, and the most that there is; `most` None: not measured."""

    name: str
    needed: float
    most: float | None

    @property
    def share(self) -> float:
        """The share of the resource that is needed, 0 if it was not measured."""
        return self.needed / self.most if self.most else 0.0


def batch_of(ranks: int, cores: int) -> int:
    """Return the batch that has a part for each core: 4,096 by default, or more.

    >>> batch_of(1, 2), batch_of(4, 2), batch_of(64, 2)
    (4096, 8192, 16384)
    """
    return PART_ROWS * max(len(parts_of(USUAL_BATCH)), min(ranks * cores, MOST_PARTS))


def busy_cores(batch: int, ranks: int, cores: int) -> int:
    """Return the cores that have parts of a batch at once.

    >>> busy_cores(4096, 1, 2), busy_cores(4096, 4, 2), busy_cores(16384, 64, 2)
    (2, 4, 16)
    """
    return sum(min(cores, len(parts)) for parts in parts_by_rank(batch, ranks))


def resources(inputs: Inputs, machine: Machine, stream: Stream, ranks: int) -> list[Resource]:
    """Return what a stream needs of each resource of so many ranks."""
    examples = stream.examples(inputs)
    model, rows = stream.model, stream.rows
    batch = batch_of(ranks, machine.cores)
    step = traffic(model, batch, ranks, stream.distinct)
    cores = ranks * machine.cores
    busy = busy_cores(batch, ranks, machine.cores)
    own, first = memory_bytes(model, rows, ranks)
    joiner = min(waiting_bytes(inputs, examples) / ranks, JOIN_BYTES)
    experts = experts_limit(inputs.ftrl.value, model)
    written = disk_bytes(inputs, stream, ranks)
    return [
        Resource("dense compute", examples, per_core(inputs.dense, inputs.cores, busy)),
        Resource("sub-batch turns", examples, inputs.turns.value),
        Resource("network", examples, network_limit(step, model, batch, machine.link, inputs)),
        Resource("FTRL experts", examples, experts),
        Resource("rank 0 besides", examples, inputs.besides.value),
        Resource("decode", stream.events, per_core(inputs.decode, inputs.cores, cores)),
        Resource("join", stream.events, times(inputs.join.value, ranks)),
        Resource("disk", written, machine.disk),
        Resource("memory of rank 0", first + joiner, machine.memory),
        Resource("memory of others", own + joiner, machine.memory),
    ]


def times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def per_core(measured: Input, of: int, cores: int) -> float | None:
    """Return the rate of so many cores, from one that was measured on `of` cores."""
    return times(measured.value, cores / of)


def network_limit(
    step: Traffic, model: Model, batch: int, link: float, inputs: Inputs
) -> float | None:
    """Return the examples a second that the links carry, None for one rank.

    An example takes the time of its share of the step, and that of its events on rank 0's link.
    """
    if step.ranks == 1:
        return None
    clicks = (inputs.events.value or 1.0) - 1.0
    front = 8.0 * front_bytes(model, 1.0, clicks, step.ranks) / link
    return 1.0 / (step.seconds(link) / batch + front)


def experts_limit(ftrl: float | None, model: Model) -> float | None:
    """Return the examples a second of the four experts on one core, by the columns that they read.

    `ftrl` is the measured rate of one expert over the fields.

    >>> experts_limit(536.0, Model(fields=39))
    39.0
    """
    pairs = len(choose_columns(model.fields))
    columns = EXPERTS_OVER_FIELDS * model.fields + EXPERTS_OVER_PAIRS * pairs
    return times(ftrl, model.fields / columns)


def waiting_bytes(inputs: Inputs, examples: float) -> float:
    """Return the bytes of the impressions that wait for their clicks, at so many a second."""
    return examples * WAITING_SECONDS * (inputs.waiting.value or 0.0)


def disk_bytes(inputs: Inputs, stream: Stream, ranks: int) -> float:
    """Return the bytes a second that rank 0 writes: rows, experts, deltas, spilled impressions."""
    model, rows, examples = stream.model, stream.rows, stream.examples(inputs)
    snapshot = model.row_bytes * rows / ranks + expert_bytes(rows)
    delta = delta_bytes(model, rows, examples * DELTA_SECONDS, stream.distinct)
    spilled = max(waiting_bytes(inputs, examples) / ranks - JOIN_BYTES, 0.0)
    return snapshot / SNAPSHOT_SECONDS + delta / DELTA_SECONDS + spilled / WAITING_SECONDS


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ranks that a stream needs, and the resource that ends first, with its share.

    `share` is that of the resource at so many ranks; above 1 there is not enough of it.
    """

    ranks: int
    resources: list[Resource]

    @property
    def first(self) -> Resource:
        return max(self.resources, key=lambda resource: resource.share)

    @property
    def short(self) -> int:
        """The number of resources of which there is not enough."""
        return sum(resource.share > 1.0 for resource in self.resources)

    @property
    def enough(self) -> bool:
        return not self.short


def verdict(at: Callable[[int], list[Resource]]) -> Verdict:
    """Return the least ranks that suffice, else the least ones that lack the least.

    `at` returns the resources at a number of ranks.

    >>> verdict(lambda ranks: [Resource("dense", 3.0, ranks), Resource("turns", 1.0, 2.0)]).ranks
    4
    >>> short = verdict(lambda ranks: [Resource("dense", 3.0, ranks), Resource("turns", 3.0, 2.0)])
    >>> short.enough, short.ranks, short.first.name
    (False, 4, 'turns')
    """
    found = [Verdict(ranks, at(ranks)) for ranks in RANKS]
    return min(found, key=lambda each: (max(each.first.share, 1.0), each.short, each.ranks))
