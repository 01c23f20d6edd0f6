"""Named places where a test can end, pause or break the process, to see what a crash leaves behind.

The environment variable `STREAM_CTR_FAILPOINT` selects one of them:

    NAME                     end the process when it first reaches the place
    NAME:N                   end it when it reaches the place for the N-th time
    NAME:N=sleep:SECONDS     wait there instead
    NAME:N=out-of-memory     raise `MemoryError` there instead

The process ends as with `kill -9`: at once, without cleaning up, with exit code 137. Without the
variable, a failpoint costs one comparison.

Where `torchrun` has started several processes, this applies to the one with rank 0, or to the one
with the rank in `STREAM_CTR_FAILPOINT_RANK`, and with `torchrun --max-restarts` only before the
first restart.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Mapping
from time import sleep
from typing import NamedTuple

from stream_ctr.errors import ConfigError

VARIABLE = "STREAM_CTR_FAILPOINT"
RANK_VARIABLE = "STREAM_CTR_FAILPOINT_RANK"
EXIT_CODE = 137  # what a shell reports for a process that SIGKILL ended

# The state at each failpoint, in the order of a run. Each name is used at one place in the code.
FAILPOINTS = {
    "poll.after": "records are read, none of them is joined",
    "join.after": "records are joined, none of their examples is learned",
    "seam.before": "an input has ended, the first records of the next one are read, none is joined",
    "seam.after": "the examples of the input that has ended are learned, the next one begins",
    "learn.before": "a batch is cut, no model has seen it",
    "learn.after": "the models in this process have learned a batch, the baseline may not have",
    "cut.before": "a snapshot is due, no state is copied",
    "cut.after": "the state is copied, none of it is on disk",
    "delta.copied": "what changed since the last delta is copied, none of it is on disk",
    "predictions.before": "a part of the predictions is on disk under a temporary name",
    "predictions.after": "the part is visible, its snapshot is not written",
    "snapshot.file": "one more tensor file of an unfinished snapshot is on disk",
    "snapshot.files": "all tensor files are on disk, the manifest is not",
    "snapshot.manifest": "the manifest is on disk too, the snapshot is not visible yet",
    "snapshot.rename": "the snapshot is visible, its name may not be on disk",
    "commit.before": "the snapshot is on disk, offsets are not committed",
    "commit.after": "offsets are committed, the snapshot is not published",
    "pointer.before": "the new pointer is on disk next to the old one",
    "pointer.after": "latest.json is replaced",
    "announce.before": "the pointer is about to be sent to its topic",
    "announce.after": "the broker has the pointer",
    "delta.payload": "the payload of a delta is on disk, its header is not",
    "delta.header": "the header is on disk too, the index does not list the delta",
    "delta.index": "the index of the deltas is replaced",
    "delta.retain": "the index lists expired deltas no more, their files are still there",
    "retain.before": "the snapshot is published, no expired snapshot is removed",
    "retain.hidden": "an expired snapshot is hidden, its files are still there",
    "retain.after": "expired snapshots are removed",
    "ranks.announced": "the other ranks have heard of the next call, rank 0 has not made it",
    "ranks.call": "a rank other than 0 has heard of the next call, and has not made it",
}

_SYNTAX = re.compile(
    r"([^:=]*)(?::([1-9][0-9]*))?(?:=(kill|out-of-memory|sleep:[0-9]+(?:\.[0-9]+)?))?"
)


class Armed(NamedTuple):
    """The selected failpoint, the number of times to reach it, and the action there."""

    name: str
    time: int = 1
    action: str = "kill"


def parse(text: str) -> Armed:
    """Return the failpoint that a value of the variable selects.

    Raises `ConfigError` for an unknown name or action.

    >>> parse("snapshot.rename")
    Armed(name='snapshot.rename', time=1, action='kill')
    >>> parse("learn.after:12=sleep:8")
    Armed(name='learn.after', time=12, action='sleep:8')
    >>> parse("learn")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    stream_ctr.errors.ConfigError: STREAM_CTR_FAILPOINT='learn' is no failpoint; did you mean ...
    """
    match = _SYNTAX.fullmatch(text)
    if match is None:
        actions = "=kill, =sleep:SECONDS, =out-of-memory or nothing"
        raise ConfigError(
            f"{VARIABLE}={text!r} must be NAME or NAME:N with N from 1 on, then {actions}"
        )
    name, count, action = match.groups()
    if name not in FAILPOINTS:
        near = difflib.get_close_matches(name, FAILPOINTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FAILPOINTS)}"
        raise ConfigError(f"{VARIABLE}={text!r} is no failpoint; {hint}")
    return Armed(name, int(count or 1), action or "kill")


def armed(environ: Mapping[str, str]) -> Armed:
    """Return the failpoint that the environment selects for this process, with no name for none.

    >>> armed({"STREAM_CTR_FAILPOINT": "poll.after"}).name
    'poll.after'
    >>> armed({"STREAM_CTR_FAILPOINT": "poll.after", "RANK": "1"}).name
    ''
    """
    found = parse(environ[VARIABLE]) if environ.get(VARIABLE) else Armed("")
    meant = environ.get("RANK", "0") == environ.get(RANK_VARIABLE, "0")
    restarted = environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return found if meant and not restarted else Armed("")


# Read once, on import: a process that starts without a failpoint never has one.
_ARMED = armed(os.environ)
_REACHED = itertools.count(1)


def failpoint(name: str) -> None:
    """Act here if the environment selects this failpoint: end, wait or run out of memory.

    >>> failpoint("poll.after")
    """
    if name == _ARMED.name and next(_REACHED) == _ARMED.time:
        _act()


def _act() -> None:
    if _ARMED.action == "out-of-memory":
        raise MemoryError(f"{VARIABLE}={_ARMED.name}")
    if _ARMED.action != "kill":
        os.write(2, f"waiting, by {VARIABLE}={_ARMED.name}:{_ARMED.time}\n".encode())
        sleep(float(_ARMED.action.removeprefix("sleep:")))
        return
    os.write(2, f"ended by {VARIABLE}={_ARMED.name}:{_ARMED.time}\n".encode())
    os._exit(EXIT_CODE)
