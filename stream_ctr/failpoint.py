"""Named places where the process can be made to die, so that a test can show what a crash there leaves behind.

`STREAM_CTR_FAILPOINT=NAME` ends the process the first time it comes to that place, `NAME:N` the N-th time: at once and without any cleaning
up, as `kill -9` does, with exit code 137. Without the variable a failpoint is one comparison.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re

from stream_ctr.errors import ConfigError

VARIABLE = "STREAM_CTR_FAILPOINT"
EXIT_CODE = 137  # what a shell calls a process that SIGKILL ended

# In the order of a run. Every name stands here once, and at one place in the code.
FAILPOINTS = {
    "poll.after": "records were read, none of them is joined",
    "join.after": "records are joined, what became of them is not learned",
    "learn.before": "a batch is cut, no model has seen it",
    "learn.after": "the deep model has learned a batch, the baseline may not have",
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

_SPELLED = re.compile(r"([^:]*)(?::([1-9][0-9]*))?")


def parse(text: str) -> tuple[str, int]:
    """The name of the failpoint that `text` asks for, and which time of reaching it is meant.

    >>> parse("snapshot.rename"), parse("learn.after:12")
    (('snapshot.rename', 1), ('learn.after', 12))
    >>> parse("snapshot.renamed")
    Traceback (most recent call last):
        ...
    stream_ctr.errors.ConfigError: STREAM_CTR_FAILPOINT='snapshot.renamed' is no failpoint; did you mean 'snapshot.rename'?
    """
    spelled = _SPELLED.fullmatch(text)
    if spelled is None:
        raise ConfigError(f"{VARIABLE}={text!r} must be NAME or NAME:N with N from 1 on")
    name, count = spelled.groups()
    if name not in FAILPOINTS:
        near = difflib.get_close_matches(name, FAILPOINTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FAILPOINTS)}"
        raise ConfigError(f"{VARIABLE}={text!r} is no failpoint; {hint}")
    return name, int(count or 1)


# Read once: a run that began without a failpoint never meets one.
_ARMED, _COUNT = parse(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else (None, 0)
_REACHED = itertools.count(1)


def failpoint(name: str) -> None:
    """Die here if the environment says so.

    >>> failpoint("poll.after")
    """
    if name == _ARMED and next(_REACHED) == _COUNT:
        os.write(2, f"ended by {VARIABLE}={name}:{_COUNT}\n".encode())
        os._exit(EXIT_CODE)
