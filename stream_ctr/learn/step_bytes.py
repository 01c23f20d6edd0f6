"""The bytes that the ranks of a run send each other in a step, as a formula.

    N  ranks, of which A have parts     C  columns      V  fields with a value
    R  floats of a row in use           P  parameters   K  coordinates of a row
    n  examples of a rank               p  parts of it  s  parameters of its slice, about P / N

    command            rank 0 -> each             1024
    examples           rank 0 -> rank             (4 C + 4 V + 1) (n + tail)
    how many rows      each -> each               8
    numbers of rows    rank -> owner              4 for each row that another rank has
    rows               owner -> rank              4 R for each, and 2 with the online rule
    all numbers finite each -> each               4
    dense gradients    rank -> owner of a slice   4 p (P - s)
    new parameters     owner of a slice -> each   4 s
    logits             rank -> rank 0             8 for each example that it steps, else 4 n

    online             rank -> the one before     4 (1 + C K) for each example of its head, and
                                                  4 C where the network reads w
                       the one before -> rank     4 for each example of its head
                       rank with parts -> each    16, and 4 R for each row that it passes on or
                                                  gives back to another rank
                       rank -> rank 0             4 n where the logits are those without dropout
    adagrad, adam      each -> each               8
                       rank -> owner              4 (2 + K) for each entry (example, column) whose
                                                  row another rank has

Gradients of the dense part are sent for models whose network learns. A rank sends a row at most
twice, so a step sends about 8 R + 6 bytes for each distinct row of each rank, whatever N is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stream_ctr.learn.adam import pieces_of
from stream_ctr.learn.batch_shares import Share

FRAME = 1024  # bytes of a command that is not long
_COUNT = 8
_FLAG = 4
_FLOAT = 4
_LOGIT = 8
_INTERCEPT = 16


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a network, as far as the bytes of a step depend on them.

    `row_floats` are those of a row that are in use. `parameters` is 0 for a model without dense
    gradients, and with `slopes_w` the network reads the first-order weights. With
    `undropped`, the online rule drops units and returns the logits without dropout as well.
    """

    columns: int
    width: int
    row_floats: int
    parameters: int
    values: int = 0
    online: bool = True
    network: bool = True
    slopes_w: bool = False
    undropped: bool = False


def bytes_a_step(
    shape: StepShape, shares: Sequence[Share], *, fetched: float, passed: float
) -> float:
    """Return the bytes that all ranks together send to each other in a step.

    `shares` are those of the ranks. `fetched` is the number of rows that ranks borrow from others,
    summed over the ranks. `passed` is that of rows which they pass on and give back under the
    online rule, or else that of entries whose rows others have.

    With ids that are hashed evenly, `fetched` is (N - 1) / N of the distinct rows of the ranks.

    >>> from stream_ctr.learn.batch_shares import shares_of
    >>> from stream_ctr.learn.cpu_step import parts_of
    >>> shape = StepShape(columns=39, width=10, row_floats=13, parameters=480_000)
    >>> shares = shares_of(4096, parts_of(4096), ranks=2, sub_batch=256)
    >>> round(bytes_a_step(shape, shares, fetched=30_000, passed=30_000) / 1e6, 1)
    9.4
    """
    ranks = len(shares)
    pairs = ranks * (ranks - 1)
    example = _FLOAT * (shape.columns + shape.values) + 1
    reply = _FLOAT * shape.row_floats + (2 if shape.online else 0)
    total = (
        FRAME * (ranks - 1)
        + example * sum(len(share.examples) + share.tail for share in shares[1:])
        + (_COUNT + _FLAG) * pairs
        + (_FLOAT + reply) * fetched
        + _dense(shape, shares)
    )
    return total + (_online if shape.online else _entries)(shape, shares, passed)


def _dense(shape: StepShape, shares: Sequence[Share]) -> float:
    """Return the bytes of dense gradients and of new parameters."""
    sizes = [piece.stop - piece.start for piece in pieces_of(shape.parameters, len(shares))]
    gradients = sum(
        len(share.parts) * (shape.parameters - size)
        for share, size in zip(shares, sizes, strict=True)
    )
    return _FLOAT * (gradients + (len(shares) - 1) * shape.parameters)


def _online(shape: StepShape, shares: Sequence[Share], passed: float) -> float:
    heads = sum(share.head for share in shares)
    slopes = 1 + shape.columns * (shape.width + shape.slopes_w) if shape.network else 0
    messages = sum(bool(share.examples) for share in shares) * (len(shares) - 1)
    return (
        _FLOAT * heads * (slopes + 1)
        + _INTERCEPT * messages
        + _FLOAT * shape.row_floats * passed
        + _LOGIT * sum(len(share.steps) for share in shares[1:])
        + _FLOAT * shape.undropped * sum(len(share.examples) for share in shares[1:])
    )


def _entries(shape: StepShape, shares: Sequence[Share], passed: float) -> float:
    return (
        _COUNT * len(shares) * (len(shares) - 1)
        + _FLOAT * (2 + shape.width) * passed
        + _FLOAT * sum(len(share.examples) for share in shares[1:])
    )
