"""Trainers whose ranks, threads of this process, all read and join."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stream_ctr.cli.front import KIND, FrontMaker
from stream_ctr.config import load
from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.snapshots import snapshot
from stream_ctr.train.source import Source
from support.thread_ranks import on_threads
from support.trainers import SMALL, finish, trainer


def run_front(
    size: int,
    directory: Path,
    source_of: Callable[[int], Any],
    *,
    inputs_of: Callable[[Any], Any] = lambda source: source,
    **arguments: Any,
) -> dict[str, Any]:
    """Run a small trainer to the end on `size` ranks; return the last report as a JSON object.

    `source_of(rank)` is the source that the rank opens, and `inputs_of` makes the inputs of the run
    of rank 0's. It resumes from a snapshot that is there. `arguments` are those of `trainer`.
    """
    directory.mkdir(exist_ok=True)
    sections = {name: value for name, value in arguments.items() if isinstance(value, dict)}
    config = load(environ={}, overrides={**SMALL, **sections})

    def work(ranks: Ranks) -> dict[str, Any] | None:
        with contextlib.ExitStack() as stack:
            opened: Source = source_of(ranks.rank)
            maker = FrontMaker(config, directory, lambda _: opened, stack=stack)
            team = Team(ranks, {KIND: maker})
            if ranks.rank:
                team.follow()
                return None
            try:
                make = partial(maker.lead, team)
                built = trainer(directory, inputs_of(opened), front=make, **arguments)
                opened.trainer = built  # type: ignore[attr-defined]
                if newest := snapshot.newest(directory / "snapshots"):
                    built.restore(newest)
                return finish(built)
            finally:
                team.close()

    report: dict[str, Any] = on_threads(size, work)[0]
    return report
