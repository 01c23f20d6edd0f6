"""What all ranks must have in common before the first step, and what they do together before it.

A rank with other code or another configuration would compute other sums, and one that sees another
state directory would go on from another place in the log. So the ranks compare facts, each a name
and a text, and a difference ends them all with one error that names it and the ranks.

>>> from stream_ctr.distributed.ranks import Ranks
>>> require_same(Ranks.alone(), {"learn.seed": "1"}, way_out="use one configuration")
>>> together(Ranks.alone(), lambda: 6 * 7)
42
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import torch

from stream_ctr import __version__
from stream_ctr.distributed.ranks import RankError, Ranks
from stream_ctr.errors import (
    BrokerError,
    ConfigError,
    DataError,
    SnapshotError,
    StreamCtrError,
)
from stream_ctr.messages import one_line

T = TypeVar("T")
SAME_CODE = "install the same release, and the same libraries, everywhere"
_MOST_SHOWN = 5
_LONGEST_VALUE = 100
_KINDS = {
    kind.exit_code: kind
    for kind in (StreamCtrError, ConfigError, BrokerError, DataError, SnapshotError)
}


class Failed(StreamCtrError):
    """The error of another rank, with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Return what `work` returns on this rank, once it is done on every rank.

    If it raises an error with an exit code anywhere, each rank raises that of the lowest such rank.
    """
    error: Exception | None = None
    try:
        done = work()
    except RankError:
        raise
    except Exception as found:
        if not isinstance(getattr(found, "exit_code", None), int):
            raise
        error = found
    told = [getattr(error, "exit_code", 0), str(error or "")]
    for rank, (code, message) in enumerate(_collected(ranks, told)):
        if code and rank == ranks.rank:
            assert error
            raise error
        if code:
            raise failure(int(code), f"rank {rank}: {message}" if rank else str(message))
    return done


def failure(exit_code: int, message: str) -> StreamCtrError:
    """Return an error with this exit code.

    >>> failure(3, "there is no model 'fmm'")
    ConfigError("there is no model 'fmm'")
    """
    kind = _KINDS.get(exit_code)
    return kind(message) if kind else Failed(message, exit_code)


def require_same(ranks: Ranks, facts: Mapping[str, str], *, way_out: str) -> None:
    """Raise `ConfigError` on every rank unless all ranks have the same facts.

    The error names each difference, who has which value, and the `way_out`. The facts are shown,
    and are sent as they are: none may be a secret.
    """
    found = _collected(ranks, dict(facts))
    if different := list(_differences(found)):
        more = len(different) - _MOST_SHOWN
        shown = different[:_MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise ConfigError(f"the ranks differ: {'; '.join(shown)}. Way out: {way_out}")


def code() -> dict[str, str]:
    """Return what decides the bits of a model besides its configuration: code and processor.

    >>> code()["stream_ctr"] == __version__
    True
    """
    return {
        "stream_ctr": __version__,
        "the source of stream_ctr": _digest_of_sources(Path(__file__).parents[1]),
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "numba")},
        "the instructions of the processor": torch.backends.cpu.get_cpu_capability(),
    }


def _collected(ranks: Ranks, value: T) -> list[T]:
    """Return the value, of plain types, of each rank."""
    packed = np.frombuffer(msgspec.msgpack.encode(value), np.uint8)
    return [msgspec.msgpack.decode(each.tobytes()) for each in ranks.collect(packed)]


def _differences(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    names = dict.fromkeys(name for facts in found for name in facts)
    for name in names:
        holders: dict[str | None, list[int]] = {}
        for rank, facts in enumerate(found):
            holders.setdefault(facts.get(name), []).append(rank)
        if len(holders) > 1:
            yield f"{one_line(name)} is {', '.join(_held(*each) for each in holders.items())}"


def _held(value: str | None, ranks: Sequence[int]) -> str:
    shown = "missing" if value is None else one_line(value, _LONGEST_VALUE) or '""'
    numbers = ", ".join(map(str, ranks[:_MOST_SHOWN])) + (" ..." * (len(ranks) > _MOST_SHOWN))
    return f"{shown} on rank{'s' * (len(ranks) > 1)} {numbers}"


def _digest_of_sources(package: Path) -> str:
    """Return a digest of all modules of a package and their names."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(package, followlinks=True):
        folders.sort()
        for path in sorted(Path(folder) / name for name in names if name.endswith(".py")):
            inside = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(package).as_posix()} {inside}\n".encode())
    return digest.hexdigest()[:16]
