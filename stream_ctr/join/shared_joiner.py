"""The join on several ranks: each rank joins the impressions whose ids it owns.

A rank reads partitions, and its events belong to any rank. Three things make the examples those of
one joiner, and in its order:

1. The reader of a partition finds the watermark `limit` that the partition had at each event, and
   the limit travels with the event. So an event is late by the same rule as in one process.
2. All joiners have one watermark, which rank 0 finds from the watermarks of all partitions, and
   they move it at the same point between two pushes.
3. Released rows travel with the columns that order them. A rank offers its first rows, and where it
   has more, all ranks release nothing beyond the last row that it offers. So rank 0 gets the first
   rows of all, and merges them.

A push on N ranks thus equals the push of one poll in one process that has the events of the ranks,
one rank after another. The joiner's rules make the examples a function of the log for any polls
(see `join_state`), and so for any number of ranks.

Every method but `figures` is called on all ranks, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.events.batch import Arrivals, EventBatch, LabelledArrivals
from stream_ctr.join import shared_state
from stream_ctr.join.examples import Examples
from stream_ctr.join.join_state import COUNTERS, CURVE_SECONDS, given_key, pack, unpack
from stream_ctr.join.joiner import LabelJoiner
from stream_ctr.join.pending import Order
from stream_ctr.join.shuffle import Blocks, exchange, gather_rows, owner_of
from stream_ctr.join.watermark import MARKS, NOT_YET, InOrder, Watermarks

Array = npt.NDArray[Any]

_DELAYS = (2, len(CURVE_SECONDS) + 1)
_PARTS = 1 << 20  # of the share of a joiner's room that is taken


class Figures(NamedTuple):
    """The sum of the joiners of all ranks."""

    counters: npt.NDArray[np.int64]
    delays: npt.NDArray[np.int64]
    pending: int
    nbytes: int
    filled: float
    segments: int

    @classmethod
    def none(cls) -> Figures:
        """Return the figures of joiners without any event."""
        return cls(np.zeros(len(COUNTERS), np.int64), np.zeros(_DELAYS, np.int64), 0, 0, 0.0, 0)


class Release(NamedTuple):
    """Examples in order; with `more`, further ones may be released at the same watermark."""

    examples: Examples
    more: bool


class Waiting(NamedTuple):
    """The event time of the oldest pending impression, None if there is none."""

    oldest_ms: int | None


class _News(NamedTuple):
    """The changes by a rank's events: its stalls, its latest click, the marks of its partitions.

    `marks` has an array for each of `MARKS`, and `clicked` the partitions that had a click.
    """

    stalls: int
    latest_click: int
    marks: list[npt.NDArray[np.int64]]
    clicked: npt.NDArray[np.int64]


class SharedJoiner:
    """This rank's part of a join; rank r reads the partitions r, r + N and so on of `partitions`.

    `joiner` holds what this rank owns. `watermarks` are those of all partitions; a rank advances
    its own ones, and gets those of the others with each push.
    """

    def __init__(
        self,
        ranks: Ranks,
        joiner: LabelJoiner,
        watermarks: Watermarks,
        *,
        partitions: range,
        columns: int,
        value_fields: int,
        id_bits: int,
    ) -> None:
        self.joiner = joiner
        self.watermarks = watermarks
        self.figures = Figures.none()
        """Those of all ranks after the last call, on rank 0."""
        self.partitions_of = [partitions[rank :: ranks.size] for rank in range(ranks.size)]
        self._ranks = ranks
        self._blocks = Blocks.of(columns=columns, value_fields=value_fields, id_bits=id_bits)
        self._columns = columns
        self._id_bytes = joiner.id_bytes

    @property
    def _leads(self) -> bool:
        return self._ranks.rank == 0

    # -- in ---------------------------------------------------------------------------------------

    def push(self, events: EventBatch | None, *, present: range | None = None) -> None:
        """Add what each rank has read: `events` of its own partitions, None if there are none.

        With `present`, the other ranks first take over the watermarks that rank 0 has.
        """
        if present is not None:
            self._take_over(present)
        clicked, later, limits = self._observe(events)
        rows, owners = self._rows(events, limits)
        self._push_rows(*exchange(self._ranks, self._blocks.events, rows, owners))
        self._gather_figures(later, clicked)

    def _take_over(self, present: range) -> None:
        marks = self.watermarks
        for name in (*MARKS, "all_since_click"):
            self._ranks.broadcast(getattr(marks, name))
        marks.present = present

    def _observe(
        self, events: EventBatch | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], tuple[Array, ...]]:
        """Advance the watermarks of all partitions by the events of all ranks.

        Return the partitions that had a click, how many impressions of this rank are later than the
        last click of each present partition, and the limits of this rank's events by kind.
        """
        marks = self.watermarks
        stalls = marks.stalls
        limits: tuple[Array, ...] = (np.empty(0, np.int64),) * 3
        came = InOrder.of(events) if events else None
        if came:
            limits = came.by_kind(
                marks.advance(came.partition, came.time, came.click, came.labelled)
            )
        clicks = came.time[came.click] if came else np.empty(0, np.int64)
        clicked = came.partition[came.click] if came else np.empty(0, np.int32)
        own = np.array(self.partitions_of[self._ranks.rank], np.int64)
        head = [marks.stalls - stalls, int(clicks.max(initial=NOT_YET))]
        mine = [getattr(marks, name)[own].astype(np.int64) for name in MARKS]
        message = np.concatenate([head, *mine, np.isin(own, clicked)]).astype(np.int64)
        news = self._tell_all(message)
        self._enter(news)
        shown = came.time[~(came.click | came.labelled)] if came else np.empty(0, np.int64)
        later = marks.later_than_clicks(shown)
        if (latest := max(each.latest_click for each in news)) > NOT_YET:
            marks.follow(np.array([latest]))
        return np.concatenate([each.clicked for each in news]), later, limits

    def _tell_all(self, message: npt.NDArray[np.int64]) -> list[_News]:
        columns = len(MARKS) + 1
        counts = [2 + columns * len(own) for own in self.partitions_of]
        received = self._ranks.exchange([message] * self._ranks.size, counts=counts)
        news = []
        for own, each in zip(self.partitions_of, received, strict=True):
            *marks, clicked = each[2:].reshape(columns, len(own))
            stalls, latest_click = each[:2].tolist()
            news.append(_News(stalls, latest_click, marks, np.array(own, np.int64)[clicked > 0]))
        return news

    def _enter(self, news: Sequence[_News]) -> None:
        """Take over the watermarks of the other ranks' partitions."""
        for rank, each in enumerate(news):
            if rank == self._ranks.rank:
                continue
            own = np.array(self.partitions_of[rank], np.int64)
            for name, column in zip(MARKS, each.marks, strict=True):
                getattr(self.watermarks, name)[own] = column
            self.watermarks.stalls += each.stalls

    def _rows(
        self, events: EventBatch | None, limits: tuple[Array, ...]
    ) -> tuple[list[Mapping[str, Array]], list[npt.NDArray[np.int64]]]:
        """Return the columns of this rank's events by kind, and who owns them."""
        if not events:
            empty = [block.empty() for block in self._blocks.events]
            return list(empty), [np.empty(0, np.int64)] * 3
        given = events.examples
        impressions = {
            **_event_columns(events.impressions, limits[0]),
            "true_probability": events.true_probability,
            "values": events.values,
            "ids": pack(events.ids, self._id_bytes),
        }
        clicks = _event_columns(events.clicks, limits[1])
        examples: Mapping[str, Array] = self._blocks.examples.empty()
        if len(given):
            examples = {
                **_event_columns(given.arrivals, limits[2]),
                "true_probability": given.true_probability,
                "values": given.values,
                "label": given.label,
                "ids": pack(given.ids, self._id_bytes),
            }
        keys = (impressions["id_hash"], clicks["id_hash"], given_key(examples["id_hash"]))
        kinds: list[Mapping[str, Array]] = [impressions, clicks, examples]
        return kinds, [owner_of(key, self._ranks.size) for key in keys]

    def _push_rows(
        self,
        impressions: Mapping[str, Array],
        clicks: Mapping[str, Array],
        examples: Mapping[str, Array],
    ) -> None:
        """Push what this rank owns, as `LabelJoiner.push` does."""
        joiner = self.joiner
        joiner.push_impressions(
            _arrivals(impressions),
            impressions["ids"],
            impressions["values"],
            impressions["true_probability"],
            limit=np.maximum(impressions["limit"], joiner.watermark),
        )
        joiner.push_clicks(_arrivals(clicks), limit=np.maximum(clicks["limit"], joiner.watermark))
        given = LabelledArrivals(
            _arrivals(examples),
            examples["label"],
            examples["ids"],
            examples["values"],
            examples["true_probability"],
        )
        joiner.push_labelled(given, limit=np.maximum(examples["limit"], joiner.watermark))

    # -- out --------------------------------------------------------------------------------------

    def release(self, watermark: int | None, at_most: int) -> Release:
        """Move the watermark of all joiners, and return the first examples on rank 0.

        Without a watermark every open window is closed, as in `LabelJoiner.drain`. At most
        `at_most` examples are returned, which is no less than the number of ranks.
        """
        joiner = self.joiner
        if watermark is None:
            joiner.drop_clicks()
        else:
            joiner.reach(watermark)
        before = joiner.closes_before(drain=watermark is None)
        share = max(1, at_most // self._ranks.size)
        slots, order = joiner.first(before, share + 1)
        n, more = self._agree(order, share)
        rest = before if n == len(slots) else int(order.time[n])
        released = joiner.release(slots[:n], rest=rest)
        if watermark is not None:
            joiner.forget()
        counts = self._gather_figures(released=n)
        return Release(self._merge(released, order.first(n), counts), more)

    def _agree(self, order: Order, share: int) -> tuple[int, bool]:
        """Return how many of its first rows this rank releases, and whether any rank keeps some.

        `order` has up to `share` rows, and one beyond them if there are more.
        """
        more = len(order.time) > share
        offered = min(share, len(order.time))
        message = np.zeros(4, np.int64)
        if more:
            message[0] = 1
            message[1:] = [int(column[share - 1]) for column in order]
        told = self._ranks.exchange([message] * self._ranks.size, counts=[4] * self._ranks.size)
        last = [tuple(each[1:].tolist()) for each in told if each[0]]
        if not last:
            return offered, False
        time, partition, place = min(last)
        return min(offered, order.count_to((time, partition, place))), True

    def _merge(self, examples: Examples, order: Order, counts: list[int]) -> Examples:
        """Return the examples of all ranks in order on rank 0, and none elsewhere."""
        if self._ranks.size == 1:
            return examples
        rows = {
            **examples.arrays(),
            "partition": order.partition,
            "place": order.place,
            "ids": pack(examples.ids, self._id_bytes),
        }
        merged = gather_rows(self._ranks, self._blocks.released, rows, counts)
        key = Order(merged["closed_ms"], merged["partition"], merged["place"])
        by = key.argsort()
        if not self._leads:
            return self.none()
        columns = {name: merged[name][by] for name in examples.arrays()}
        columns["ids"] = unpack(columns["ids"], self._id_bytes)
        return Examples(**columns)

    def none(self) -> Examples:
        """Return no examples."""
        columns = self._blocks.released.empty()
        return Examples(
            **{
                **{field.name: columns[field.name] for field in fields(Examples)},
                "ids": np.empty((0, self._columns), np.int32),
            }
        )

    # -- figures ----------------------------------------------------------------------------------

    def waiting(self) -> Waiting:
        """Return what waits on all ranks, on rank 0; every rank looks at all that it has."""
        oldest_ms = self.joiner.oldest_pending_ms
        own = [] if oldest_ms is None else [oldest_ms]
        told = self._ranks.gather(np.array(own, np.int64))
        return Waiting(min((int(each[0]) for each in told if len(each)), default=None))

    def _gather_figures(
        self,
        later: npt.NDArray[np.int64] | None = None,
        clicked: npt.NDArray[np.int64] | None = None,
        *,
        released: int = 0,
    ) -> list[int]:
        """Bring the figures of all ranks to rank 0; return how many rows each rank `released`.

        After a push, `later` has this rank's counts for `Watermarks.count_since_clicks`, and
        `clicked` the partitions of all ranks that had a click.
        """
        joiner = self.joiner
        figures = (
            released,
            joiner.pending,
            joiner.nbytes,
            int(joiner.filled * _PARTS),
            joiner.segment_count,
        )
        later = np.empty(0, np.int64) if later is None else later
        message = np.concatenate([figures, joiner.counters, joiner.delays.reshape(-1), later])
        told = self._to_rank_0(message.astype(np.int64))
        if told is None:
            return []
        first = len(figures)
        delays = first + len(COUNTERS)
        end = delays + joiner.delays.size
        total = told.sum(axis=0)
        self.figures = Figures(
            counters=total[first:delays],
            delays=total[delays:end].reshape(_DELAYS),
            pending=int(total[1]),
            nbytes=int(total[2]),
            filled=int(told[:, 3].max()) / _PARTS,
            segments=int(total[4]),
        )
        if clicked is not None:
            self.watermarks.count_since_clicks(total[end:], clicked)
        counts: list[int] = told[:, 0].tolist()
        return counts

    def _to_rank_0(self, message: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Return the messages of all ranks, which are equally long, on rank 0."""
        size = self._ranks.size
        counts = [len(message) if self._leads else 0] * size
        parts = [message if to == 0 else message[:0] for to in range(size)]
        received = self._ranks.exchange(parts, counts=counts)
        return np.stack(received) if self._leads else None

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Return the state of all ranks on rank 0, as that of one joiner."""
        return shared_state.gather(self._ranks, self.joiner.state_dict())

    def segments(self) -> dict[str, tuple[Path, str, int]]:
        """Return the files of all ranks on rank 0, as `LabelJoiner.segments` does."""
        own = [[name, str(path), *rest] for name, (path, *rest) in self.joiner.segments().items()]
        told = self._ranks.gather(np.frombuffer(msgspec.msgpack.encode(own), np.uint8))
        return {
            name: (Path(path), sha256, size)
            for each in told
            for name, path, sha256, size in msgspec.msgpack.decode(each.tobytes())
        }

    def load_state_dict(
        self,
        state: Mapping[str, Array] | None = None,
        segments: Mapping[str, tuple[Path, str]] | None = None,
    ) -> None:
        """Share out the `state` and `segments` of rank 0 among the ranks.

        Raises `ValueError` on rank 0 if a rank cannot take over a segment.
        """
        files = {name: [str(path), sha256] for name, (path, sha256) in (segments or {}).items()}
        sent = self._ranks.broadcast_bytes(msgspec.msgpack.encode(files) if self._leads else None)
        found = msgspec.msgpack.decode(sent)
        own = shared_state.share_out(self._ranks, state, self.joiner.state_dict())
        problem = None
        try:
            self.joiner.load_state_dict(
                own, {name: (Path(path), sha256) for name, (path, sha256) in found.items()}
            )
        except ValueError as error:
            problem = str(error)
        problem = self._ranks.agree(problem)
        if problem and self._leads:
            raise ValueError(problem)
        self._gather_figures()


def _event_columns(events: Arrivals, limit: npt.NDArray[np.int64]) -> dict[str, Array]:
    return {
        "id_hash": events.id_hash,
        "time": events.time,
        "place": events.place,
        "partition": events.partition,
        "limit": limit,
    }


def _arrivals(rows: Mapping[str, Array]) -> Arrivals:
    return Arrivals(rows["id_hash"], rows["time"], rows["partition"], rows["place"])
