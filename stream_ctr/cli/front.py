"""The front of a run on several ranks: each opens the topics, and reads its partitions of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stream_ctr.cli.assembly import build_front
from stream_ctr.cli.client import connector_errors
from stream_ctr.cli.registry import open_schemas
from stream_ctr.cli.voice import say
from stream_ctr.config import Config
from stream_ctr.distributed.agreement import together
from stream_ctr.distributed.ranks import Ranks
from stream_ctr.distributed.team import Team
from stream_ctr.snapshots.manifest import Input, RunIdentity
from stream_ctr.train.front import Front
from stream_ctr.train.front_lead import Faces, faces
from stream_ctr.train.inputs import Inputs, input_name
from stream_ctr.train.source import Source

KIND = "front"


class FrontMaker:
    """Makes this rank's `Front`, as the maker of a team for objects of the kind `KIND`.

    `open_source` opens the topics, up to their end or not, and is called on all ranks but 0, which
    has opened them already. What a rank opens is closed with `stack`. `directory` is the state
    directory, and `registry` the properties of the schema registry.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        open_source: Callable[[bool], Source],
        *,
        stack: contextlib.ExitStack,
        registry: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._directory = directory
        self._open_source = open_source
        self._stack = stack
        self._registry = registry
        self._inputs: Inputs | None = None  # those of rank 0

    def lead(self, team: Team, identity: RunIdentity, inputs: Inputs) -> Faces:
        """Make the front on all ranks, and return rank 0's faces of it."""
        self._inputs = inputs
        partitions = len(inputs.last)
        say(
            f"{input_name(inputs.names[inputs.last.start :])}: {partitions} "
            f"partition{'s' * (partitions > 1)}, read by all ranks"
        )
        number, made = team.make(
            KIND,
            identity=msgspec.to_builtins(identity),
            ended=msgspec.to_builtins(inputs.before),
            positions=inputs.ended_positions,
            until_end=inputs.until_end,
        )
        return faces(team, number, made)

    def __call__(
        self,
        ranks: Ranks,
        *,
        identity: Mapping[str, Any],
        ended: Sequence[Mapping[str, Any]],
        positions: Mapping[str, int],
        until_end: bool,
    ) -> Front:
        """Make the front of this rank.

        Raises the error of the first rank that cannot read the topics, on every rank.
        """
        inputs = together(
            ranks, lambda: self._inputs or self._open(ended, positions, until_end=until_end)
        )
        front = build_front(
            self._config,
            msgspec.convert(identity, RunIdentity),
            inputs,
            ranks,
            self._directory,
            schemas=open_schemas(self._config, self._registry),
            translated=connector_errors,
        )
        self._stack.callback(front.close)  # before the source
        return front

    def _open(
        self,
        ended: Sequence[Mapping[str, Any]],
        positions: Mapping[str, int],
        *,
        until_end: bool,
    ) -> Inputs:
        with connector_errors():
            source = self._open_source(until_end)
        if close := getattr(source, "close", None):
            self._stack.callback(close)
        return Inputs(
            [source], ended=msgspec.convert(ended, tuple[Input, ...]), positions=positions
        )
