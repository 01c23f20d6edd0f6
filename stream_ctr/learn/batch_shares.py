"""Which examples of a batch belong to which rank.

Of the C parts of a batch, rank r of N runs the network on those in [r C // N, (r + 1) C // N). This
may be none. The online rule steps sub-batches of 256 examples, of which one may begin on a rank and
end on the next one. The rank on which it begins steps all of it:

    parts         |      rank 0      |      rank 1      |
    sub-batches   |    0    |    1    |    2    |   3   |
    tail of rank 0          ..........|~|
    head of rank 1                    |~|

For the examples of its tail a rank gets the slopes from the next one, and gives the gradients back.
Where a batch has several parts, none has fewer than 256 rows, so that no sub-batch reaches farther
than the next rank with a part.

>>> from stream_ctr.learn.cpu_step import parts_of
>>> [share.steps for share in shares_of(600, parts_of(640), ranks=2, sub_batch=256)]
[range(0, 512), range(512, 600)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """The share of one rank in a batch.

    `parts` are the numbers of its parts, and `examples` those in them, without padding. `steps` are
    the examples that it steps.
    """

    parts: range
    examples: range
    steps: range

    @property
    def head(self) -> int:
        """The number of its first examples that another rank steps."""
        return min(self.steps.start, self.examples.stop) - self.examples.start

    @property
    def tail(self) -> int:
        """The number of examples after its own that it steps."""
        return self.steps.stop - self.examples.stop if self.steps else 0


def shares_of(
    n: int, parts: Sequence[slice], *, ranks: int, sub_batch: int | None = None
) -> list[Share]:
    """Return the share of each rank of a batch of `n` examples.

    `parts` are those of the batch that have examples. Without sub-batches, which only the online
    rule has, each rank steps the examples of its parts.
    """
    count = len(parts)
    ends = [parts[at].start if at < count else n for at in range(count + 1)]
    shares = []
    for rank in range(ranks):
        numbers = range(rank * count // ranks, (rank + 1) * count // ranks)
        examples = range(ends[numbers.start], ends[numbers.stop])
        steps = examples
        if sub_batch:
            first, last = (
                min(-(-edge // sub_batch) * sub_batch, n)
                for edge in (examples.start, examples.stop)
            )
            steps = range(first, last)
        shares.append(Share(numbers, examples, steps))
    return shares


def most_parts(parts: int, ranks: int) -> int:
    """Return the largest number of parts that a rank has of `parts` parts.

    >>> most_parts(4, 3), most_parts(16, 4)
    (2, 4)
    """
    return max((rank + 1) * parts // ranks - rank * parts // ranks for rank in range(ranks))
