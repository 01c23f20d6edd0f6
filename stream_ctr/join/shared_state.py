"""The state of a joiner whose impressions are shared out among ranks, as one state.

Each rank has the impressions, remembered ids and waiting clicks whose keys it owns. `gather` makes
of these the state that one joiner would have, and `share_out` gives each rank its part of a state.
So a snapshot does not know how many ranks there were, and any number of them resumes from it.

Counters and delays are sums. A segment keeps its number, for the ranks number theirs differently.
When the number of ranks changes, the rows of one segment may belong to several of them: each links
the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_ctr.distributed.ranks import Ranks
from stream_ctr.join.join_state import COUNTERS, given_key, is_given
from stream_ctr.join.shuffle import owner_of
from stream_ctr.join.spill import segment_of

Array = npt.NDArray[Any]
State = Mapping[str, Array]

_FEATURES = ("pending.truth", "pending.ids", "pending.values")
_SEGMENTS = ("segments.number", "segments.rows", "segments.last")
_SUMS = ("counters", "delays")


def gather(ranks: Ranks, own: State) -> dict[str, Array]:
    """Return the state of all ranks together on rank 0, and nothing elsewhere.

    `own` is the `state_dict` of this rank's joiner. Columns come one after another, so that rank 0
    needs little more memory than the state takes.
    """
    state = _complete(own)
    leads = ranks.rank == 0

    def column(name: str) -> Array:
        parts = ranks.gather(state[name])
        return np.concatenate(parts) if leads else state[name][:0]

    merged = _pending(ranks, state, column)
    merged |= _segments({name: column(name) for name in _SEGMENTS})
    known = {name: column(name) for name in ("known.key", "known.time", "known.evicted")}
    merged |= _sorted(known, by=("known.key",))
    clicks = {name: column(name) for name in ("clicks.key", "clicks.time", "clicks.limit")}
    merged |= _sorted(clicks, by=("clicks.limit", "clicks.key", "clicks.time"))
    for name in _SUMS:
        merged[name] = column(name).reshape(-1, *own[name].shape).sum(axis=0)
    if not leads:
        return {}
    if not merged["known.evicted"].any():
        del merged["known.evicted"]
    return merged | {"watermark": own["watermark"]}


def share_out(ranks: Ranks, state: State | None, like: State) -> dict[str, Array]:
    """Return this rank's part of the `state` that rank 0 gives.

    `like` is the `state_dict` of a joiner without any impression. The counters stay with rank 0.
    """
    like = {name: array[:0] for name, array in _complete(like).items()}
    shares = _Shares(state, ranks.size) if state is not None else None
    part = {
        name: ranks.scatter(shares.of(name) if shares else None, array)
        for name, array in like.items()
    }
    for name in _SUMS:
        part[name] = part[name][0]
    if not len(part["segments.number"]):
        for name in _SEGMENTS:
            del part[name]
    if (part["pending.place"] >= 0).all():
        del part["pending.place"]
    return part


# -- gathering -----------------------------------------------------------------------------------


def _complete(own: State) -> dict[str, Array]:
    """Return a state with the columns that a joiner leaves out when they say nothing."""
    n = len(own["pending.time"])
    none = {name: np.empty(0, np.int64) for name in _SEGMENTS}
    return {
        **none,
        "segments.before": np.empty(0, np.int64),
        "pending.place": np.arange(n),
        "known.evicted": np.zeros(len(own["known.key"]), np.bool_),
        **own,
        **{name: own[name][None] for name in _SUMS},
    }


def _pending(ranks: Ranks, state: State, column: Callable[[str], Array]) -> dict[str, Array]:
    """Return the pending impressions of all ranks in order."""
    rows = ranks.gather(np.array([len(state["pending.truth"])]))
    place = column("pending.place")
    owned = ranks.gather(np.array([len(state["pending.time"])]))
    if rows:
        before = np.cumsum(np.concatenate(rows)) - np.concatenate(rows)
        place += np.where(place >= 0, np.repeat(before, np.concatenate(owned)), 0)
    keys = {name: column(f"pending.{name}") for name in ("time", "partition", "offset")}
    order = np.lexsort((keys["offset"], keys["partition"], keys["time"]))
    merged = {f"pending.{name}": array[order] for name, array in keys.items()}
    for name in ("id_hash", "click", "delay"):
        merged[f"pending.{name}"] = column(f"pending.{name}")[order]
    place = place[order]
    here = place >= 0
    for name in _FEATURES:
        merged[name] = column(name)[place[here]]
    if not here.all():
        merged["pending.place"] = np.where(here, np.cumsum(here) - 1, place)
    return merged


def _segments(columns: dict[str, Array]) -> dict[str, Array]:
    """Return each segment once, by its number; nothing without segments."""
    number, first = np.unique(columns["segments.number"], return_index=True)
    if not len(number):
        return {}
    return {name: column[first] for name, column in columns.items()}


def _sorted(columns: dict[str, Array], *, by: tuple[str, ...]) -> dict[str, Array]:
    order = np.lexsort([columns[name] for name in by])
    return {name: column[order] for name, column in columns.items()}


# -- sharing out ---------------------------------------------------------------------------------


class _Shares:
    """The parts of a state, a column at a time."""

    def __init__(self, state: State, size: int) -> None:
        counters = np.zeros(len(COUNTERS), np.int64)
        counters[: len(state["counters"])] = state["counters"]  # an older state has fewer
        self._state = _complete({**state, "counters": counters})
        self._size = size
        id_hash = self._state["pending.id_hash"]
        given = is_given(self._state["pending.click"])
        self._owners = {
            "pending": owner_of(np.where(given, given_key(id_hash), id_hash), size),
            "known": owner_of(self._state["known.key"], size),
            "clicks": owner_of(self._state["clicks.key"], size),
        }
        place = self._state["pending.place"]
        self._places = [place[self._owners["pending"] == rank] for rank in range(size)]

    def of(self, name: str) -> list[Array]:
        """Return the column `name` of each rank's part."""
        column = self._state[name]
        kind = name.partition(".")[0]
        if name in _FEATURES:
            return [column[place[place >= 0]] for place in self._places]
        if name == "pending.place":
            return [
                np.where(place >= 0, np.cumsum(place >= 0) - 1, place) for place in self._places
            ]
        if kind in self._owners:
            return [column[self._owners[kind] == rank] for rank in range(self._size)]
        if name == "segments.before":
            return [np.array([self._state["segments.number"].max(initial=-1)])] * self._size
        if name in _SEGMENTS:
            number = self._state["segments.number"]
            return [column[np.isin(number, segment_of(each[each < 0]))] for each in self._places]
        if name in _SUMS:
            return [column, *[0 * column] * (self._size - 1)]
        return [column] * self._size
