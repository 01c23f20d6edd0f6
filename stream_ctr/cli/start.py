"""The start of a run: its state directory, where it begins, and its configuration.

One process does all of it. On several ranks, rank 0 opens the state directory, and each rank loads
the configuration over what is kept there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_ctr.cli import runs
from stream_ctr.cli.assembly import register_named_models, signing_key
from stream_ctr.cli.beginning import Beginning, find_beginning
from stream_ctr.cli.options import Settings
from stream_ctr.config import Config
from stream_ctr.snapshots.lease import Lease


@dataclass(frozen=True, slots=True)
class Begun:
    """The state directory that a run holds, where it begins, and the configuration kept there."""

    lease: Lease
    beginning: Beginning | None
    kept: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The configuration in force, and the properties of the Kafka client and of the registry."""

    config: Config
    client: dict[str, object]
    registry: Mapping[str, str]


Learn = Callable[[Begun, Loaded, runs.Others | None], None]
"""Runs a run from its start to its end."""


@dataclass(frozen=True, slots=True)
class Start:
    """The start of a run, as its options say.

    `extra` are pairs as of -X, and `inputs` keys of the section `input`.
    """

    settings: Settings
    extra: tuple[str, ...]
    inputs: Mapping[str, str | None]
    state: Path
    begin_from: Path | None = None
    take_over: bool = False

    def given(self) -> Config:
        """Return the configuration without what the state directory keeps."""
        return self.settings.load(extra=self.extra)[0]

    @contextlib.contextmanager
    def open(self) -> Iterator[Begun]:
        """Hold the state directory while the block runs."""
        beginning = None
        if self.begin_from:
            beginning = find_beginning(self.begin_from, self.state, _verify(self.given()))
        with runs.state_directory(self.state, take_over=self.take_over) as lease:
            if beginning:
                yield Begun(lease, beginning, beginning.config)
            else:
                kept = runs.kept_config(self.state, _verify(self.given()))
                yield Begun(lease, None, kept)

    def load(self, kept: Mapping[str, Any] | None) -> Loaded:
        """Return the configuration over what is `kept`, and the options of the clients.

        A wrong client property is an error even if the run reads logs.
        """
        # Before the configuration that the state directory keeps, whose names import nothing.
        register_named_models(self.given())
        config, properties = self.settings.load(base=kept, extra=self.extra, **self.inputs)
        client = self.settings.client(config, properties)
        return Loaded(config, client, self.settings.registry(properties))


def _verify(config: Config) -> Any:
    key = signing_key(config)
    return key.verify if key else None
