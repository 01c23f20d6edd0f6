"""The state machine of the label join, and the compiled passes that run it.

States of an impression, by its entry in the index and its row among the pending:

| state | entry | meaning |
|---|---|---|
| absent | EMPTY | never seen, or forgotten after the duplicate horizon |
| in memory | slot >= 0, feature_row >= 0 | pending: its label window is open |
| on disk | slot >= 0, feature_row < 0 | pending, and its features are in a segment |
| left | LEFT | its window has closed and its example was released |
| evicted | EVICTED | dropped while it was pending, to keep within the memory bound |

Transitions. "Again" is a second impression of the same id within the duplicate horizon:

| state | impression arrives | window closes | memory is full | horizon passes |
|---|---|---|---|---|
| absent | in memory | - | - | - |
| in memory | again: duplicate | left | on disk, or evicted | - |
| on disk | again: duplicate; in memory if it replaces | left | evicted | - |
| left | again: duplicate, dropped | - | absent | absent |
| evicted | again: duplicate, dropped | - | absent | absent |

An impression that arrives after its own window has closed is late, and dropped in every state.

Fates of a click, by the state of its impression. A window at t is [t - early, t + label]:

| state | before the window | in the window | after the window, or arrived after it |
|---|---|---|---|
| absent | waiting | waiting | waiting |
| in memory, on disk | waiting | joined, or duplicate if it is not the first | late |
| left | waiting | late | late |
| evicted | waiting | evicted | evicted |

A waiting click joins when its impression arrives, or is counted as late if it is after that
impression's window. It is counted as unmatched once no impression can want it any more, which may
be so when it arrives, and as evicted when it is dropped to keep within the memory bound. A joined
click is also early when it precedes its impression. Of one id, the 32 earliest clicks wait and
others are evicted: an impression looks at all that wait for it, and a producer could send any
number of both.

These rules make the examples a function of the log, however polls interleave the partitions:

1. An event is late by the watermark of its own partition when it arrived (its `limit`), never by
   the overall watermark.
2. Among several impressions of one id the first in (event time, partition, place) is kept,
   whichever arrived first. One that replaces another keeps its click only if the click is in the
   new window too, by `click_end`.
3. Among several clicks of an impression the earliest counts as the first, whatever their order.
4. The horizon is measured between events. Entries are purged later, and a stale one is ignored.
   An impression beyond the horizon of a pending one of its id is new: both become examples. A
   click beyond it finds nothing, also when its impression is pending or comes later.
5. Examples are released in the order (event time, partition, place).

An event of kind `example` came with its label and awaits no click. It is released once the
watermark has passed its event time. One that arrives behind the watermark `limit` of its own
partition is late: it is released as if its time were `limit`, which is as soon as the watermark
moves on. So a labelled example at t is released when the watermark passes max(t, limit), and an
impression at t when it passes t + label. Both kinds leave in one order: (time of release,
partition, place). As no event is released before the watermark that its own partition had when it
arrived, and the overall watermark is at most that, nothing that arrives later can precede what was
released: this order, too, is a function of the log.

A labelled example is a pending row with a time of max(t, limit) - label, so one order serves both
kinds. Its label and lateness stand in place of `click_end` (see `given`). Its id is another than
that of an impression with the same text (see `given_key`): no click finds it. Rule 2 holds with
the time of release in place of the event time, and so does the horizon.

Eviction depends on the polls as well, and so does a partition that was excused as idle and comes
back behind the overall watermark.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from stream_ctr.join.spill import ROW_BITS

Array = npt.NDArray[Any]

COUNTERS = (
    "impressions",  # all that arrived
    "impressions_late",  # arrived after their own window had closed; never an example
    "impressions_duplicate",
    "clicks",  # all that arrived
    "clicks_joined",
    "clicks_early",  # joined, and before their impression in event time
    "clicks_duplicate",  # a second click of the same impression
    "clicks_late",  # made or arrived after the window of their impression
    "clicks_unmatched",  # no impression came while they waited
    "impressions_spilled",  # their features were on disk for a while
    "impressions_evicted",  # a uniform share of the pending, whatever their label
    "clicks_evicted",  # of an evicted impression, or dropped while waiting
    "ids_forgotten_early",  # before the duplicate horizon, to keep within the memory bound
    "labelled",  # examples that came with their label: all that arrived
    "labelled_late",  # arrived behind the watermark; released as soon as it moves on
    "labelled_duplicate",
    "labelled_evicted",
)
IMPRESSIONS = COUNTERS.index("impressions")
IMPRESSIONS_LATE = COUNTERS.index("impressions_late")
IMPRESSIONS_DUPLICATE = COUNTERS.index("impressions_duplicate")
CLICKS = COUNTERS.index("clicks")
CLICKS_JOINED = COUNTERS.index("clicks_joined")
CLICKS_EARLY = COUNTERS.index("clicks_early")
CLICKS_DUPLICATE = COUNTERS.index("clicks_duplicate")
CLICKS_LATE = COUNTERS.index("clicks_late")
CLICKS_UNMATCHED = COUNTERS.index("clicks_unmatched")
IMPRESSIONS_SPILLED = COUNTERS.index("impressions_spilled")
IMPRESSIONS_EVICTED = COUNTERS.index("impressions_evicted")
CLICKS_EVICTED = COUNTERS.index("clicks_evicted")
IDS_FORGOTTEN_EARLY = COUNTERS.index("ids_forgotten_early")
LABELLED = COUNTERS.index("labelled")
LABELLED_LATE = COUNTERS.index("labelled_late")
LABELLED_DUPLICATE = COUNTERS.index("labelled_duplicate")
LABELLED_EVICTED = COUNTERS.index("labelled_evicted")

# Delays of clicks are counted between these bounds, for the curve of lost clicks by label window.
CURVE_SECONDS = (
    *(1, 2, 5, 10, 20, 30),
    *(60, 120, 300, 600, 1200, 1800),
    *(3600, 7200, 14400, 28800, 43200, 86400),
)
_LEAST_DELAY = -(1 << 31)
_LONGEST_DELAY = (1 << 31) - 1
IN_WINDOW = 0
AFTER_WINDOW = 1

NEVER = np.iinfo(np.int64).max
EMPTY = np.int32(-1)  # a free entry of the index, or the end of a chain of waiting clicks
LEFT = np.int32(-2)
EVICTED = np.int32(-3)

# Positions in the `sizes` of the arrays below.
USED = 0  # rows from the start of the arrays that are or were in use; entries of the index
FREED = 1  # rows on the stack `free`
ALIVE = 1  # waiting clicks

# In place of `click_end`, a labelled example has GIVEN + 2 * lateness + label. No event time and no
# watermark is that far in the past.
GIVEN = -(1 << 62)
_GIVEN_END = -(1 << 61)
_GIVEN_KEY = np.uint64(0x6A09E667F3BCC909)

PACKED_BYTES = 3
PACKED_BITS = 8 * PACKED_BYTES
_BYTE = 0xFF

MOST_WAITING_OF_AN_ID = 32
# An impression draws one of these lots by its id; the least lots are evicted first.
_LOT_BITS = 12
_LOTS = 1 << _LOT_BITS
_BINS = 1 << 12


# A number and two odd factors [3], see `_spread`. Not a tuple of scalars, whose type numba takes
# milliseconds to find at a call.
Secret = npt.NDArray[np.uint64]


class Windows(NamedTuple):
    """The lengths of time of the join, in milliseconds."""

    label_ms: int
    early_ms: int
    horizon_ms: int


class EventColumns(NamedTuple):
    """Columns [n] of events of one kind, in order of arrival.

    `limit` is the watermark of each event's own partition when it arrived.
    """

    id_hash: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int32]
    place: npt.NDArray[np.int64]
    limit: npt.NDArray[np.int64]


class FeatureColumns(NamedTuple):
    """Columns of the features of n impressions; `ids` [n, bytes] as `pack` returns them."""

    true_probability: npt.NDArray[np.float64]
    ids: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float32]


class PendingArrays(NamedTuple):
    """Arrays of the pending impressions; a slot is an index into them.

    `time` is NEVER in a free slot. `click_end` is the least end that the window may have for one
    of the clicks to count: the later of the click's time and its `limit`, the least of all clicks;
    NEVER without a click. For a labelled example both have another meaning (see above). `delay` is
    that of the earliest of these clicks, undefined without one, and cut to 32 bits.
    `feature_row` is the row of the features in `FeatureArrays`, or negative
    for a place on disk (see `spill`). `free` is a stack of free slots.
    """

    id_hash: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int32]
    place: npt.NDArray[np.int64]
    click_end: npt.NDArray[np.int64]
    delay: npt.NDArray[np.int32]
    feature_row: npt.NDArray[np.int64]
    free: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]


class FeatureArrays(NamedTuple):
    """Arrays of the features in memory; `free` is a stack of free rows."""

    true_probability: npt.NDArray[np.float64]
    ids: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float32]
    free: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]


class IndexArrays(NamedTuple):
    """A hash table from id to (event time, slot), with open addressing and linear probing.

    `slot` is a slot of `PendingArrays`, EMPTY, LEFT or EVICTED. `secret` decides where a key stands
    (see `_spread`).
    """

    key: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int32]
    secret: Secret
    sizes: npt.NDArray[np.int64]


class WaitingArrays(NamedTuple):
    """Waiting clicks, in chains by id: `head` starts each chain and `next` goes on with it."""

    key: npt.NDArray[np.uint64]
    time: npt.NDArray[np.int64]
    limit: npt.NDArray[np.int64]
    next: npt.NDArray[np.int32]
    head: npt.NDArray[np.int32]
    alive: npt.NDArray[np.bool_]
    secret: Secret
    sizes: npt.NDArray[np.int64]


class Counts(NamedTuple):
    """`counters` [COUNTERS], and clicks by delay: `delays` [IN_WINDOW or AFTER_WINDOW, delay].

    A delay is at most that of CURVE_SECONDS at the same position, or longer than all of them.
    """

    counters: npt.NDArray[np.int64]
    delays: npt.NDArray[np.int64]


def pack(ids: npt.NDArray[np.int32], id_bytes: int) -> npt.NDArray[np.uint8]:
    """Return the low 3 or 4 bytes of `ids` [n, F] as [n, F * id_bytes].

    >>> pack(np.array([[1, 0x012345]], np.int32), 3).tolist()
    [[1, 0, 0, 69, 35, 1]]
    """
    if id_bytes == PACKED_BYTES:
        return _pack(ids)
    return np.ascontiguousarray(ids).view(np.uint8)


def unpack(packed: npt.NDArray[np.uint8], id_bytes: int) -> npt.NDArray[np.int32]:
    """Return the ids [n, F] of packed ones [n, F * id_bytes]."""
    return _unpack(packed) if id_bytes == PACKED_BYTES else packed.view(np.int32)


def is_given(click_end: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which pending rows are labelled examples [n]."""
    return click_end < _GIVEN_END


def given(
    click_end: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return the lateness in milliseconds [n] and the label [n] of labelled examples.

    >>> lateness, label = given(np.array([GIVEN, GIVEN + 1, GIVEN + 2 * 500 + 1]))
    >>> lateness.tolist(), label.tolist()
    ([0, 0, 500], [0, 1, 1])
    """
    code = click_end - GIVEN
    return code >> 1, (code & 1).astype(np.uint8)


def given_key(id_hash: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the keys of labelled examples in the index [n]; applied twice, it changes nothing."""
    return id_hash ^ _GIVEN_KEY


@numba.njit(cache=True, nogil=True)
def _pack(ids):  # type: ignore[no-untyped-def]
    packed = np.empty((ids.shape[0], ids.shape[1] * PACKED_BYTES), np.uint8)
    for i in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            first = PACKED_BYTES * j
            packed[i, first] = ids[i, j] & _BYTE
            packed[i, first + 1] = (ids[i, j] >> 8) & _BYTE
            packed[i, first + 2] = (ids[i, j] >> 16) & _BYTE
    return packed


@numba.njit(cache=True, nogil=True)
def _unpack(packed):  # type: ignore[no-untyped-def]
    ids = np.empty((packed.shape[0], packed.shape[1] // PACKED_BYTES), np.int32)
    for i in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            first = PACKED_BYTES * j
            ids[i, j] = (
                np.int32(packed[i, first])
                | np.int32(packed[i, first + 1]) << 8
                | np.int32(packed[i, first + 2]) << 16
            )
    return ids


# -- the index -----------------------------------------------------------------------------------
#
# The loops take the arrays out of their tuples first: numba counts a reference whenever a field of
# a tuple is read, and in the loop that costs the join a tenth of its speed.


@numba.njit(cache=True, inline="always")
def _scalars(secret):  # type: ignore[no-untyped-def]
    """Return the numbers of a secret, which then cost no load in a loop."""
    return secret[0], secret[1], secret[2]


@numba.njit(cache=True, inline="always")
def _spread(key, mask, secret):  # type: ignore[no-untyped-def]
    """Return a position from 0 to `mask` that nobody can foresee who does not know `secret`.

    Keys are hashes of ids, and anyone can choose ids with the hashes that they want. With positions
    taken from the hash itself, a producer could send ids that all have one position.
    """
    key = (key ^ secret[0]) * secret[1]
    key = (key ^ (key >> np.uint64(32))) * secret[2]
    return np.int64((key >> np.uint64(32)) & np.uint64(mask))


@numba.njit(cache=True, inline="always")
def _find(key, keys, slots, secret):  # type: ignore[no-untyped-def]
    """Return the position of `key`, or the empty position where it belongs."""
    mask = len(keys) - 1
    position = _spread(key, mask, secret)
    while slots[position] != EMPTY and keys[position] != key:
        position = (position + 1) & mask
    return position


@numba.njit(cache=True)
def insert_all(key, time, slot, index):  # type: ignore[no-untyped-def]
    """Insert n entries, or overwrite those with the same keys."""
    keys, times, slots, secret = index.key, index.time, index.slot, _scalars(index.secret)
    for i in range(len(key)):
        position = _find(key[i], keys, slots, secret)
        if slots[position] == EMPTY:
            index.sizes[USED] += 1
        keys[position] = key[i]
        times[position] = time[i]
        slots[position] = slot[i]


@numba.njit(cache=True)
def mark_all(key, slot, state, index):  # type: ignore[no-untyped-def]
    """Set n entries to `state`, LEFT or EVICTED, where they still point to `slot` [n]."""
    keys, slots, secret = index.key, index.slot, _scalars(index.secret)
    for i in range(len(key)):
        position = _find(key[i], keys, slots, secret)
        if slots[position] == slot[i]:
            slots[position] = state


@numba.njit(cache=True)
def rehash(index, before):  # type: ignore[no-untyped-def]
    """Move every entry to where it belongs, in place.

    Entries in the states LEFT and EVICTED with a time before `before` are removed.

    The pass starts after an empty position, and takes out and puts back one entry after another.
    The positions between an entry's home and the entry were visited before, and keep their
    entries. In a table that has just grown, whose new half is empty, some entries are put further
    on instead; they stay there when the pass reaches them.
    """
    keys, times, slots, secret = index.key, index.time, index.slot, _scalars(index.secret)
    mask = len(keys) - 1
    start = 0
    while slots[(start - 1) & mask] != EMPTY:
        start += 1
    for step in range(len(keys)):
        position = (start + step) & mask
        key = keys[position]
        time = times[position]
        slot = slots[position]
        if slot == EMPTY:
            continue
        slots[position] = EMPTY
        if slot <= LEFT and time < before:
            index.sizes[USED] -= 1
            continue
        target = _find(key, keys, slots, secret)
        keys[target] = key
        times[target] = time
        slots[target] = slot


@numba.njit(cache=True)
def nth_time(time, slot, n):  # type: ignore[no-untyped-def]
    """Return the nth least time (from 0) of the entries in the states LEFT and EVICTED.

    There must be more than n. Each pass counts them in bins, and looks into the bin of the nth.
    """
    least = NEVER
    most = -NEVER
    for position in range(len(time)):
        if slot[position] <= LEFT:
            least = min(least, time[position])
            most = max(most, time[position])
    counts = np.empty(_BINS, np.int64)
    while least < most:
        width = (most - least) // _BINS + 1
        counts[:] = 0
        for position in range(len(time)):
            if slot[position] <= LEFT and least <= time[position] <= most:
                counts[(time[position] - least) // width] += 1
        bin_ = 0
        while n >= counts[bin_]:
            n -= counts[bin_]
            bin_ += 1
        least += bin_ * width
        most = min(most, least + width - 1)
    return least


# -- waiting clicks ------------------------------------------------------------------------------


@numba.njit(cache=True)
def _wait(key, time, limit, waiting):  # type: ignore[no-untyped-def]
    row = waiting.sizes[USED]
    chain = _spread(key, len(waiting.head) - 1, waiting.secret)
    waiting.key[row] = key
    waiting.time[row] = time
    waiting.limit[row] = limit
    waiting.next[row] = waiting.head[chain]
    waiting.alive[row] = True
    waiting.head[chain] = row
    waiting.sizes[USED] += 1
    waiting.sizes[ALIVE] += 1


@numba.njit(cache=True, inline="always")
def _pass(chain, before, row, waiting):  # type: ignore[no-untyped-def]
    """Go on from a row of a chain, which loses the row if its click waits no longer.

    Returns the last row that is still in the chain. Otherwise each click of an id would be passed
    again by all that follow.
    """
    if waiting.alive[row]:
        return row
    if before == EMPTY:
        waiting.head[chain] = waiting.next[row]
    else:
        waiting.next[before] = waiting.next[row]
    return before


@numba.njit(cache=True)
def _wait_among_few(key, time, limit, waiting):  # type: ignore[no-untyped-def]
    """Let a click wait if it is one of the earliest of its id. Return whether one was dropped."""
    count = 0
    last = EMPTY
    chain = _spread(key, len(waiting.head) - 1, waiting.secret)
    before = EMPTY
    row = waiting.head[chain]
    while row != EMPTY:
        if waiting.alive[row] and waiting.key[row] == key:
            count += 1
            if last == EMPTY or (waiting.time[row], waiting.limit[row]) > (
                waiting.time[last],
                waiting.limit[last],
            ):
                last = row
        before = _pass(chain, before, row, waiting)
        row = waiting.next[row]
    if count < MOST_WAITING_OF_AN_ID:
        _wait(key, time, limit, waiting)
        return False
    if (time, limit) < (waiting.time[last], waiting.limit[last]):
        waiting.time[last] = time
        waiting.limit[last] = limit
    return True


@numba.njit(cache=True)
def wait_all(key, time, limit, waiting):  # type: ignore[no-untyped-def]
    """Add n waiting clicks."""
    for i in range(len(key)):
        _wait(key[i], time[i], limit[i], waiting)


# -- events --------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _count_delay(delays, row, delay_ms, clicks):  # type: ignore[no-untyped-def]
    column = 0
    while column < len(CURVE_SECONDS) and delay_ms > CURVE_SECONDS[column] * 1000:
        column += 1
    delays[row, column] += clicks


@numba.njit(cache=True, inline="always")
def _cut(delay_ms):  # type: ignore[no-untyped-def]
    """Return a delay as it is stored; the longest of CURVE_SECONDS is far below the bounds."""
    return np.int32(min(max(delay_ms, _LEAST_DELAY), _LONGEST_DELAY))


@numba.njit(cache=True)
def _count_joined(delay_ms, clicks, counts):  # type: ignore[no-untyped-def]
    """Count the earliest click of an impression by its delay, or with -1 take it back."""
    if delay_ms < 0:
        counts.counters[CLICKS_EARLY] += clicks
    _count_delay(counts.delays, IN_WINDOW, delay_ms, clicks)


@numba.njit(cache=True)
def _join_click(slot, delay_ms, click_end, pending, counts):  # type: ignore[no-untyped-def]
    """Give a click inside the window to the pending impression in `slot`.

    Of several clicks the earliest is the first, whichever arrived first.
    """
    delay = _cut(delay_ms)
    if pending.click_end[slot] == NEVER:
        pending.click_end[slot] = click_end
        pending.delay[slot] = delay
        counts.counters[CLICKS_JOINED] += 1
        _count_joined(delay, 1, counts)
        return
    pending.click_end[slot] = min(pending.click_end[slot], click_end)
    counts.counters[CLICKS_DUPLICATE] += 1
    if delay < pending.delay[slot]:
        _count_joined(pending.delay[slot], -1, counts)
        _count_joined(delay, 1, counts)
        pending.delay[slot] = delay


@numba.njit(cache=True)
def _keep_click(slot, earlier_ms, end, pending, counts):  # type: ignore[no-untyped-def]
    """Keep the click of an impression that becomes `earlier_ms` earlier, or count it as late."""
    delay = pending.delay[slot]
    _count_joined(delay, -1, counts)
    if pending.click_end[slot] > end:
        pending.click_end[slot] = NEVER
        counts.counters[CLICKS_JOINED] -= 1
        counts.counters[CLICKS_LATE] += 1
        _count_delay(counts.delays, AFTER_WINDOW, delay + earlier_ms, 1)
    else:
        pending.delay[slot] = _cut(delay + earlier_ms)
        _count_joined(pending.delay[slot], 1, counts)


@numba.njit(cache=True)
def _join_waiting(  # type: ignore[no-untyped-def]
    key,
    slot,
    time,
    windows,
    pending,
    waiting,
    counts,
):
    """Give the clicks that wait for `key` to the impression at `time` that has just arrived."""
    end = time + windows.label_ms
    inside = 0
    first = NEVER
    least_end = NEVER
    chain = _spread(key, len(waiting.head) - 1, waiting.secret)
    before = EMPTY
    row = waiting.head[chain]
    while row != EMPTY:
        click_time = waiting.time[row]
        # A click beyond the horizon knows nothing of the impression, whichever arrived first.
        arrived = max(click_time, waiting.limit[row])
        if (
            waiting.alive[row]
            and waiting.key[row] == key
            and click_time >= time - windows.early_ms
            and arrived - time <= windows.horizon_ms
        ):
            waiting.alive[row] = False
            waiting.sizes[ALIVE] -= 1
            if arrived > end:
                counts.counters[CLICKS_LATE] += 1
                _count_delay(counts.delays, AFTER_WINDOW, click_time - time, 1)
            else:
                inside += 1
                first = min(first, click_time)
                least_end = min(least_end, arrived)
        before = _pass(chain, before, row, waiting)
        row = waiting.next[row]
    if inside > 0:
        _join_click(slot, first - time, least_end, pending, counts)
        counts.counters[CLICKS_DUPLICATE] += inside - 1


@numba.njit(cache=True, inline="always")
def _take(free, sizes):  # type: ignore[no-untyped-def]
    """Return a free row, for which there must be room."""
    if sizes[FREED] > 0:
        sizes[FREED] -= 1
        return free[sizes[FREED]]
    sizes[USED] += 1
    return np.int32(sizes[USED] - 1)


@numba.njit(cache=True, nogil=True)
def push_impressions(  # type: ignore[no-untyped-def]
    events,
    features,
    windows,
    pending,
    stored,
    index,
    waiting,
    counts,
):
    """Add n impressions, `events` and `features`, for each of which all arrays must have room."""
    counters = counts.counters
    keys, times, slots, secret = index.key, index.time, index.slot, _scalars(index.secret)
    event_key, event_time, event_limit = events.id_hash, events.time, events.limit
    event_partition, event_place = events.partition, events.place
    ids, values, true_probability = features.ids, features.values, features.true_probability
    pending_id_hash, pending_time = pending.id_hash, pending.time
    pending_partition, pending_place = pending.partition, pending.place
    pending_click_end, pending_feature_row = pending.click_end, pending.feature_row
    stored_ids, stored_values = stored.ids, stored.values
    stored_true_probability = stored.true_probability
    for i in range(len(event_time)):
        key = event_key[i]
        time = event_time[i]
        limit = event_limit[i]
        end = time + windows.label_ms
        counters[IMPRESSIONS] += 1
        if limit > end:
            counters[IMPRESSIONS_LATE] += 1
            continue
        position = _find(key, keys, slots, secret)
        known = slots[position] != EMPTY
        if known and max(time, limit) - times[position] <= windows.horizon_ms:
            counters[IMPRESSIONS_DUPLICATE] += 1
            slot = slots[position]
            if slot < 0 or (time, event_partition[i], event_place[i]) >= (
                pending_time[slot],
                pending_partition[slot],
                pending_place[slot],
            ):
                continue
            if pending_click_end[slot] != NEVER:
                _keep_click(slot, pending_time[slot] - time, end, pending, counts)
        else:
            slot = _take(pending.free, pending.sizes)
            pending_click_end[slot] = NEVER
            pending_feature_row[slot] = -1
            if not known:
                index.sizes[USED] += 1
        keys[position] = key
        times[position] = time
        slots[position] = slot
        pending_id_hash[slot] = key
        pending_time[slot] = time
        pending_partition[slot] = event_partition[i]
        pending_place[slot] = event_place[i]
        if pending_feature_row[slot] < 0:
            pending_feature_row[slot] = _take(stored.free, stored.sizes)
        row = pending_feature_row[slot]
        stored_true_probability[row] = true_probability[i]
        stored_ids[row] = ids[i]
        stored_values[row] = values[i]
        if waiting.sizes[ALIVE] > 0:
            _join_waiting(key, slot, time, windows, pending, waiting, counts)


@numba.njit(cache=True, nogil=True)
def push_labelled(  # type: ignore[no-untyped-def]
    events,
    label,
    features,
    windows,
    pending,
    stored,
    index,
    counts,
):
    """Add n labelled examples, for each of which all arrays must have room.

    `events.id_hash` holds their keys.
    """
    counters = counts.counters
    keys, times, slots, secret = index.key, index.time, index.slot, _scalars(index.secret)
    for i in range(len(events.time)):
        key = events.id_hash[i]
        released = max(events.time[i], events.limit[i])
        lateness = released - events.time[i]
        time = released - windows.label_ms
        counters[LABELLED] += 1
        counters[LABELLED_LATE] += lateness > 0
        position = _find(key, keys, slots, secret)
        known = slots[position] != EMPTY
        if known and released - times[position] <= windows.horizon_ms:
            counters[LABELLED_DUPLICATE] += 1
            slot = slots[position]
            if slot < 0 or (time, events.partition[i], events.place[i]) >= (
                pending.time[slot],
                pending.partition[slot],
                pending.place[slot],
            ):
                continue
        else:
            slot = _take(pending.free, pending.sizes)
            pending.feature_row[slot] = -1
            if not known:
                index.sizes[USED] += 1
        keys[position] = key
        times[position] = released
        slots[position] = slot
        pending.id_hash[slot] = key ^ _GIVEN_KEY
        pending.time[slot] = time
        pending.partition[slot] = events.partition[i]
        pending.place[slot] = events.place[i]
        pending.click_end[slot] = GIVEN + 2 * lateness + label[i]
        if pending.feature_row[slot] < 0:
            pending.feature_row[slot] = _take(stored.free, stored.sizes)
        row = pending.feature_row[slot]
        stored.true_probability[row] = features.true_probability[i]
        stored.ids[row] = features.ids[i]
        stored.values[row] = features.values[i]


@numba.njit(cache=True, nogil=True)
def push_clicks(  # type: ignore[no-untyped-def]
    events,
    windows,
    watermark,
    pending,
    index,
    waiting,
    counts,
):
    """Add n clicks, for each of which `waiting` must have room. `watermark` is the overall one."""
    counters = counts.counters
    keys, times, slots, secret = index.key, index.time, index.slot, _scalars(index.secret)
    for i in range(len(events.time)):
        key = events.id_hash[i]
        time = events.time[i]
        limit = events.limit[i]
        counters[CLICKS] += 1
        position = _find(key, keys, slots, secret)
        slot = slots[position]
        impression_time = times[position]
        end = impression_time + windows.label_ms
        forgotten = max(time, limit) - impression_time > windows.horizon_ms
        if slot == EMPTY or forgotten or time < impression_time - windows.early_ms:
            if time < watermark - windows.label_ms - windows.early_ms:
                counters[CLICKS_UNMATCHED] += 1
            elif _wait_among_few(key, time, limit, waiting):
                counters[CLICKS_EVICTED] += 1
        elif slot == EVICTED:
            counters[CLICKS_EVICTED] += 1
        elif slot == LEFT or time > end or limit > end:
            counters[CLICKS_LATE] += 1
            _count_delay(counts.delays, AFTER_WINDOW, time - impression_time, 1)
        else:
            _join_click(slot, time - impression_time, max(time, limit), pending, counts)


# -- pending rows --------------------------------------------------------------------------------


@numba.njit(cache=True)
def _lot(key):  # type: ignore[no-untyped-def]
    """Return the lot of an id, below _LOTS.

    The hash differs from the one that samples examples for the baseline.
    """
    key = (key ^ np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    return np.int64(key >> np.uint64(64 - _LOT_BITS))


@numba.njit(cache=True)
def least_lots(id_hash, time, feature_row, n, in_memory):  # type: ignore[no-untyped-def]
    """Return the slots of the n pending impressions with the least lots.

    All with the last of these lots are returned, so there may be a few more. With `in_memory`
    only impressions whose features are in memory are considered.
    """
    drawn = np.zeros(_LOTS, np.int64)
    for slot in range(len(time)):
        if time[slot] != NEVER and (feature_row[slot] >= 0 or not in_memory):
            drawn[_lot(id_hash[slot])] += 1
    last = 0
    count = drawn[0]
    while count < n:
        last += 1
        count += drawn[last]
    slots = np.empty(count, np.int64)
    found = 0
    for slot in range(len(time)):
        if (
            time[slot] != NEVER
            and (feature_row[slot] >= 0 or not in_memory)
            and _lot(id_hash[slot]) <= last
        ):
            slots[found] = slot
            found += 1
    return slots


@numba.njit(cache=True)
def count_by_segment(time, feature_row, first, counts):  # type: ignore[no-untyped-def]
    """Add to `counts` the pending impressions in each segment from number `first` on."""
    for slot in range(len(time)):
        segment = (~feature_row[slot] >> ROW_BITS) - first
        if time[slot] != NEVER and feature_row[slot] < 0 and segment < len(counts):
            counts[segment] += 1
