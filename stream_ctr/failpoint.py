"""Named places where the process can be made to die, so that a test can show what a crash there leaves behind.

`STREAM_CTR_FAILPOINT=NAME` ends the process the first time it comes to that place, `NAME:N` the N-th time: at once and without any cleaning
up, as `kill -9` does, with exit code 137. `NAME:N=sleep:SECONDS` makes it wait there instead, `NAME:N=out-of-memory` makes memory run out.
Without the variable a failpoint is one comparison.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from time import sleep
from typing import NamedTuple

from stream_ctr.errors import ConfigError

VARIABLE = "STREAM_CTR_FAILPOINT"
EXIT_CODE = 137  # what a shell calls a process that SIGKILL ended

# In the order of a run. Every name stands here once, and at one place in the code.
FAILPOINTS = {
    "poll.after": "records were read, none of them is joined",
    "join.after": "records are joined, what became of them is not learned",
    "learn.before": "a batch is cut, no model has seen it",
    "learn.after": "the models here have learned a batch, the baseline may not have",
    "cut.before": "a snapshot is due, nothing of the state is copied",
    "cut.after": "the state is copied, nothing of it is on disk",
    "snapshot.file": "one more tensor file of an unfinished snapshot is on disk",
    "snapshot.files": "all tensor files are on disk, the manifest is not",
    "snapshot.manifest": "the manifest too is on disk, the snapshot is not visible yet",
    "snapshot.rename": "the snapshot is visible, its name may not be on disk",
    "commit.before": "the snapshot is on disk, offsets are not committed",
    "commit.after": "offsets are committed, nobody was told of the snapshot",
    "pointer.before": "the new pointer is on disk beside the old one",
    "pointer.after": "latest.json is replaced",
    "announce.before": "the pointer is about to go to its topic",
    "announce.after": "the broker has the pointer",
    "retain.before": "the snapshot is published, none too old is removed",
    "retain.hidden": "a snapshot that is too old is out of sight, its files are there",
    "retain.after": "snapshots that are too old are gone",
}

_SPELLED = re.compile(
    r"([^:=]*)(?::([1-9][0-9]*))?(?:=(kill|out-of-memory|sleep:[0-9]+(?:\.[0-9]+)?))?"
)


class Armed(NamedTuple):
    """Which failpoint, at which time of reaching it, and what happens there."""

    name: str
    time: int = 1
    action: str = "kill"


def parse(text: str) -> Armed:
    """What `text` asks for.

    >>> parse("snapshot.rename"), parse("learn.after:12=sleep:8")
    (Armed(name='snapshot.rename', time=1, action='kill'), Armed(name='learn.after', time=12, action='sleep:8'))
    >>> parse("snapshot.renamed")
    Traceback (most recent call last):
        ...
    stream_ctr.errors.ConfigError: STREAM_CTR_FAILPOINT='snapshot.renamed' is no failpoint; did you mean 'snapshot.rename'?
    """
    spelled = _SPELLED.fullmatch(text)
    if spelled is None:
        actions = "=kill, =sleep:SECONDS, =out-of-memory or nothing"
        raise ConfigError(
            f"{VARIABLE}={text!r} must be NAME or NAME:N with N from 1 on, then {actions}"
        )
    name, count, action = spelled.groups()
    if name not in FAILPOINTS:
        near = difflib.get_close_matches(name, FAILPOINTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FAILPOINTS)}"
        raise ConfigError(f"{VARIABLE}={text!r} is no failpoint; {hint}")
    return Armed(name, int(count or 1), action or "kill")


# Read once: a run that began without a failpoint never meets one.
_ARMED = parse(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else Armed("")
_REACHED = itertools.count(1)


def failpoint(name: str) -> None:
    """Die here, wait here or run out of memory here, if the environment says so.

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
