"""The front as rank 0's trainer has it: an ingest, a joiner and the watermarks of all ranks.

Each announces a call to the other ranks and makes it on rank 0's own `Front`. So the trainer's loop
is that of a run in one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_ctr.distributed.team import Team
from stream_ctr.events.batch import EventBatch
from stream_ctr.join.examples import Examples
from stream_ctr.join.join_state import CLICKS_UNMATCHED, COUNTERS
from stream_ctr.join.joiner import AT_MOST, Joiner, click_coverage, window_curve
from stream_ctr.join.shared_joiner import Release, Waiting
from stream_ctr.join.watermark import Watermarks
from stream_ctr.train.front import Front
from stream_ctr.train.ingest import Poll, Reading, SourceStatus, Times
from stream_ctr.train.inputs import Inputs

Array = npt.NDArray[Any]

_FIRST_WAIT_SECONDS = 0.005
_LONGEST_WAIT_SECONDS = 0.05


class Faces(NamedTuple):
    """The parts that the trainer has in place of its own ingest, joiner and watermarks."""

    ingest: Reading
    joiner: Joiner
    watermarks: Watermarks


def faces(team: Team, number: int, front: Front) -> Faces:
    """Return the faces of the front that every rank has under this number."""
    lead = _Lead(team, number, front)
    watermarks = front.joiner.watermarks
    assert isinstance(watermarks, LeadWatermarks)
    return Faces(FrontIngest(lead), FrontJoiner(lead, watermarks), watermarks)


class LeadWatermarks(Watermarks):
    """The watermarks of all partitions on rank 0, which know that the other ranks need a copy."""

    changed = True
    """Whether more has changed than the events of the ranks explain."""

    def begin(self, present: range) -> None:
        """Begin to read the partitions `present`."""
        super().begin(present)
        self.changed = True

    def load_state_dict(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.changed = True


class _Lead:
    """Makes calls on all ranks."""

    def __init__(self, team: Team, number: int, front: Front) -> None:
        self.front = front
        self.in_step = True
        """Whether the other ranks wait for the next call; they do not after an error in one."""
        self._team = team
        self._number = number

    def call(self, method: str, /, *, local: Mapping[str, Any] | None = None, **all_: Any) -> Any:
        """Return what a method returns here; arguments `local` are absent on the other ranks."""
        self.in_step = False
        self._team.announce(self._number, method, **all_)
        found = getattr(self.front, method)(**all_, **(local or {}))
        self.in_step = True
        return found


class FrontIngest:
    """Reads the partitions of all ranks."""

    def __init__(self, lead: _Lead) -> None:
        self._lead = lead
        self._wait_seconds = 0.0
        self._timer = _MeanTimes(lead)

    @property
    def source(self) -> Inputs:
        """Rank 0's source, which knows all partitions and commits their offsets."""
        return self._lead.front.reader.source

    @property
    def timer(self) -> Times:
        """The mean times of the readers of all ranks."""
        return self._timer

    def status(self) -> SourceStatus:
        """Return the status of the sources of all ranks."""
        status: SourceStatus = self._lead.call("status")
        return status

    def take(self, timeout_seconds: float) -> Poll:
        """Return the next polls of all ranks as one.

        A rank without a poll lets the others wait, so ranks wait only when none had anything in the
        last round, and not for long.
        """
        wait_seconds = min(self._wait_seconds, timeout_seconds)
        poll: Poll = self._lead.call("take", wait_seconds=wait_seconds)
        longer = max(_FIRST_WAIT_SECONDS, 2 * self._wait_seconds)
        self._wait_seconds = 0.0 if poll.events else min(longer, _LONGEST_WAIT_SECONDS)
        return poll

    def seek(self, positions: Mapping[int, int], leader_epochs: Mapping[int, int]) -> None:
        """Let every rank read on at these offsets."""
        self._lead.call("seek", positions=dict(positions), leader_epochs=dict(leader_epochs))

    def pause(self, partitions: frozenset[int]) -> None:
        """Let every rank read no events of exactly these partitions."""
        self._lead.call("pause", partitions=sorted(partitions))

    def close(self) -> None:
        """End the readers of all ranks, or only that of rank 0 after an error in a call."""
        if self._lead.in_step:
            self._lead.call("close")
        else:
            self._lead.front.close()


class _MeanTimes:
    """The mean times of the readers of all ranks."""

    def __init__(self, lead: _Lead) -> None:
        self._lead = lead

    def nanoseconds(self) -> dict[str, int]:
        """Return the mean time spent in each stage."""
        times: dict[str, int] = self._lead.call("stage_times")
        return times


class FrontJoiner:
    """The joiners of all ranks as one."""

    def __init__(self, lead: _Lead, watermarks: LeadWatermarks) -> None:
        self._lead = lead
        self._watermarks = watermarks
        self._shared = lead.front.joiner
        self._none = lead.front.joiner.none()
        self._exhausted = False  # nothing is released at this watermark any more
        self._waiting: Waiting | None = None  # asked for when it is needed

    # -- events and examples ----------------------------------------------------------------------

    def push(self, events: EventBatch, watermarks: Watermarks) -> None:
        """Join what the ranks have taken last, whose counts are in `events`."""
        assert watermarks is self._watermarks
        present = self._watermarks.present
        copies = [present.start, present.stop] if self._watermarks.changed else None
        self._watermarks.changed = False
        self._waiting = None
        self._lead.call("push", present=copies)

    def advance(self, watermark: int, at_most: int = AT_MOST) -> Examples:
        """Return the first examples of all ranks; see `LabelJoiner.advance`.

        Nothing that was pushed since can leave while the watermark stays, so nothing is asked then.
        """
        if self._exhausted and watermark <= self.watermark:
            return self._none
        return self._release(watermark, at_most)

    def drain(self, at_most: int = AT_MOST) -> Examples:
        """Return the first examples of all ranks; see `LabelJoiner.drain`."""
        return self._release(None, at_most)

    def _release(self, watermark: int | None, at_most: int) -> Examples:
        self._waiting = None
        released: Release = self._lead.call("release", watermark=watermark, at_most=at_most)
        self._exhausted = not released.more
        return released.examples

    # -- figures ----------------------------------------------------------------------------------

    @property
    def label_window_ms(self) -> int:
        return self._shared.joiner.label_window_ms

    @property
    def watermark(self) -> int:
        """The watermark of all joiners."""
        return self._shared.joiner.watermark

    @property
    def pending(self) -> int:
        """The number of pending impressions."""
        return self._shared.figures.pending

    @property
    def nbytes(self) -> int:
        """The number of bytes that are allocated on all ranks."""
        return self._shared.figures.nbytes

    @property
    def filled(self) -> float:
        """The share of its room that the fullest joiner has taken, from 0 to 1."""
        return self._shared.figures.filled

    @property
    def oldest_pending_ms(self) -> int | None:
        """The event time of the oldest pending impression, or None if there is none."""
        return self._look().oldest_ms

    def _look(self) -> Waiting:
        if self._waiting is None:
            self._waiting = self._lead.call("waiting")
        return self._waiting

    def counts(self) -> dict[str, int]:
        """Return the counters by name."""
        return dict(zip(COUNTERS, self._shared.figures.counters.tolist(), strict=True))

    @property
    def click_coverage(self) -> float | None:
        """See `LabelJoiner.click_coverage`."""
        return click_coverage(self.counts())

    def window_curve(self) -> list[dict[str, float]]:
        """See `LabelJoiner.window_curve`."""
        figures = self._shared.figures
        return window_curve(figures.delays, int(figures.counters[CLICKS_UNMATCHED]))

    # -- state ------------------------------------------------------------------------------------

    def segments(self) -> dict[str, tuple[Path, str, int]]:
        """Return the files of all ranks that belong to the state."""
        if not self._shared.figures.segments:
            return {}
        files: dict[str, tuple[Path, str, int]] = self._lead.call("segments")
        return files

    def state_dict(self) -> dict[str, Array]:
        """Return the state of all ranks in the form of one joiner's."""
        state: dict[str, Array] = self._lead.call("state_dict")
        return state

    def load_state_dict(
        self, state: Mapping[str, Array], segments: Mapping[str, tuple[Path, str]] | None = None
    ) -> None:
        """Replace the state of all ranks by that of one joiner, or of any number of ranks.

        Raises `ValueError` as `LabelJoiner.load_state_dict` does.
        """
        self._exhausted = False
        self._waiting = None
        self._lead.call("load_state_dict", local={"state": state, "segments": segments})
