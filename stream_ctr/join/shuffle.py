"""The shuffle: columns of events and examples on their way between ranks.

A message to a rank holds a block for each kind of rows, and a block the columns of its rows, one
after another, the widest items first. Each block is padded to a multiple of eight bytes, so the
receiver reads columns where they lie.

| kind | columns | bytes a row |
|---|---|---|
| impression | id, time, place, limit, true probability, partition, values, ids | f + 44 |
| click | id, time, place, limit, partition | 36 |
| example | those of an impression, and the label | f + 45 |
| released | id, time, place, closed, true probability, partition, values, label, ids | f + 45 |

Here f = 4 V + b (F + C) are the bytes of the features: V values of four bytes, and F + C ids of b
bytes, which is three while the table has at most 2^24 rows, else four. An event goes to the rank
that owns its id, which is its own in one case of N. A released example goes to rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.join.join_state import PACKED_BITS, PACKED_BYTES

Array = npt.NDArray[Any]
_ALIGNMENT = 8
_PLAIN_ID_BYTES = 4


class Column(NamedTuple):
    """A column of rows: `width` items each, or one item where it is None."""

    name: str
    type: Any
    width: int | None = None

    @property
    def row_bytes(self) -> int:
        """The bytes that a row has in this column."""
        items = 1 if self.width is None else self.width
        return int(np.dtype(self.type).itemsize) * items

    def empty(self, n: int = 0) -> Array:
        """Return room for n rows."""
        return np.empty(n if self.width is None else (n, self.width), self.type)


class Block:
    """Rows of one kind, as they lie in a message.

    >>> block = Block([Column("time", np.int64), Column("label", np.uint8)])
    >>> rows = {"time": np.array([5, 6]), "label": np.array([1, 0], np.uint8)}
    >>> packed = block.pack(rows)
    >>> block.row_bytes, len(packed), block.size(2)
    (9, 24, 24)
    >>> [column.tolist() for column in block.unpack(packed, 2).values()]
    [[5, 6], [1, 0]]
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return sum(column.row_bytes for column in self.columns)

    def size(self, n: int) -> int:
        """Return the bytes of n rows in a message."""
        return -(-n * self.row_bytes // _ALIGNMENT) * _ALIGNMENT

    def empty(self) -> dict[str, Array]:
        """Return the columns of no rows."""
        return {column.name: column.empty() for column in self.columns}

    def pack(self, rows: Mapping[str, Array]) -> npt.NDArray[np.uint8]:
        """Return n rows [size(n)]."""
        n = len(rows[self.columns[0].name])
        packed = np.zeros(self.size(n), np.uint8)
        start = 0
        for column in self.columns:
            end = start + n * column.row_bytes
            array = np.ascontiguousarray(rows[column.name], column.type)
            packed[start:end] = array.reshape(-1).view(np.uint8)
            start = end
        return packed

    def unpack(self, packed: npt.NDArray[np.uint8], n: int) -> dict[str, Array]:
        """Return the columns of n rows, which share the memory of `packed`."""
        rows = {}
        start = 0
        for column in self.columns:
            end = start + n * column.row_bytes
            array = packed[start:end].view(column.type)
            rows[column.name] = array if column.width is None else array.reshape(n, column.width)
            start = end
        return rows


class Blocks(NamedTuple):
    """The blocks of a join whose impressions have so many columns."""

    impressions: Block
    clicks: Block
    examples: Block
    released: Block

    @classmethod
    def of(cls, *, columns: int, value_fields: int, id_bits: int) -> Blocks:
        """Return the blocks for `columns` columns of ids, F + C, and V columns of values.

        >>> blocks = Blocks.of(columns=39, value_fields=13, id_bits=20)
        >>> [block.row_bytes for block in blocks]
        [213, 36, 214, 214]
        """
        id_bytes = PACKED_BYTES if id_bits <= PACKED_BITS else _PLAIN_ID_BYTES
        event = [Column(name, np.int64) for name in ("time", "place", "limit")]
        event.insert(0, Column("id_hash", np.uint64))
        partition = Column("partition", np.int32)
        probability = Column("true_probability", np.float64)
        values = Column("values", np.float32, value_fields)
        ids = Column("ids", np.uint8, id_bytes * columns)
        label = Column("label", np.uint8)
        closed = Column("closed_ms", np.int64)
        return cls(
            impressions=Block([*event, probability, partition, values, ids]),
            clicks=Block([*event, partition]),
            examples=Block([*event, probability, partition, values, label, ids]),
            released=Block([*event[:3], closed, probability, partition, values, label, ids]),
        )

    @property
    def events(self) -> tuple[Block, Block, Block]:
        """The blocks of the three kinds of events."""
        return self.impressions, self.clicks, self.examples


def network_bytes(
    *, columns: int, value_fields: int, id_bits: int, ranks: int, clicks: float = 0.0
) -> float:
    """Return the bytes that travel between ranks for an impression with so many clicks.

    The impression and its clicks go to its owner, and the example goes to rank 0. Each is there
    already in one case of N. Rank 0 receives the bytes of the example.

    >>> network_bytes(columns=39, value_fields=13, id_bits=20, ranks=2, clicks=0.25)
    218.0
    """
    blocks = Blocks.of(columns=columns, value_fields=value_fields, id_bits=id_bits)
    sent = blocks.impressions.row_bytes + clicks * blocks.clicks.row_bytes
    return (sent + blocks.released.row_bytes) * (1 - 1 / ranks)


def owner_of(key: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.int64]:
    """Return the rank of `size` that owns each key of the joiner's index.

    >>> owner_of(np.array([7, 8, 9], np.uint64), 2).tolist()
    [1, 0, 1]
    """
    return (key % np.uint64(size)).astype(np.int64)


def exchange(
    ranks: Ranks,
    blocks: Sequence[Block],
    kinds: Sequence[Mapping[str, Array]],
    owners: Sequence[npt.NDArray[np.int64]],
) -> Sequence[Mapping[str, Array]]:
    """Send each row to its owner; return the rows of each kind that came to this rank.

    `kinds[i]` has the columns of `blocks[i]`, and `owners[i]` the rank of each row. Rows come in
    the order of the ranks, and of one rank in the order in which it had them.

    >>> block = Block([Column("time", np.int64)])
    >>> sent = {"time": np.array([3, 4])}
    >>> exchange(Ranks.alone(), [block], [sent], [np.array([0, 0])])[0]["time"].tolist()
    [3, 4]
    """
    size = ranks.size
    if size == 1:
        return kinds
    counts = np.array([np.bincount(owner, minlength=size) for owner in owners])
    came = np.concatenate(ranks.exchange([each[None] for each in counts.T], counts=[1] * size))
    parts = _parts(blocks, kinds, owners, counts)
    sizes = [
        sum(block.size(n) for block, n in zip(blocks, row, strict=True)) for row in came.tolist()
    ]
    received = ranks.exchange(parts, counts=sizes)
    return _joined(blocks, received, came)


def gather_rows(
    ranks: Ranks, block: Block, rows: Mapping[str, Array], counts: Sequence[int]
) -> dict[str, Array]:
    """Return the rows of all ranks, in their order, on rank 0, and none elsewhere.

    `counts` are the rows of each rank, which only rank 0 needs to know.
    """
    packed = block.pack(rows)
    leads = ranks.rank == 0
    sizes = [block.size(n) for n in counts] if leads else [0] * ranks.size
    parts = [packed if to == 0 else packed[:0] for to in range(ranks.size)]
    received = ranks.exchange(parts, counts=sizes)
    if not leads:
        return block.empty()
    return _joined([block], received, np.array(counts)[:, None])[0]


def _parts(
    blocks: Sequence[Block],
    kinds: Sequence[Mapping[str, Array]],
    owners: Sequence[npt.NDArray[np.int64]],
    counts: npt.NDArray[np.int64],
) -> list[npt.NDArray[np.uint8]]:
    """Return the message to each rank; `counts` [kinds, ranks] are its rows."""
    packed: list[list[npt.NDArray[np.uint8]]] = [[] for _ in range(counts.shape[1])]
    for block, rows, owner, count in zip(blocks, kinds, owners, counts, strict=True):
        order = np.argsort(owner.astype(np.uint16), kind="stable")  # short ones sort fastest
        by_owner = {column.name: rows[column.name][order] for column in block.columns}
        ends = np.cumsum(count).tolist()
        for to, (n, end) in enumerate(zip(count.tolist(), ends, strict=True)):
            part = {name: array[end - n : end] for name, array in by_owner.items()}
            packed[to].append(block.pack(part))
    return [np.concatenate(each) for each in packed]


def _joined(
    blocks: Sequence[Block],
    received: Sequence[npt.NDArray[np.uint8]],
    counts: npt.NDArray[np.int64],
) -> list[dict[str, Array]]:
    """Return the rows of each kind; `counts` [ranks, kinds] are those that each rank sent."""
    parts: list[list[dict[str, Array]]] = [[] for _ in blocks]
    for message, row in zip(received, counts.tolist(), strict=True):
        start = 0
        for kind, (block, n) in enumerate(zip(blocks, row, strict=True)):
            end = start + block.size(n)
            parts[kind].append(block.unpack(message[start:end], n))
            start = end
    return [
        {
            column.name: np.concatenate([part[column.name] for part in each])
            for column in block.columns
        }
        for block, each in zip(blocks, parts, strict=True)
    ]
