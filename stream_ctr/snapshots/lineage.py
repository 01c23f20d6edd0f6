"""The run of a state directory: an id that is made once, and is in everything that the run writes.

The id, 128 random bits, is in `run.json`, and from there in every report, manifest and pointer. It
tells the snapshots of one run from those of another whose epochs and sequences are the same.

    run.json           snapshots                 so
    ----------------   -----------------------   ------------------------------------------------
    holds an id        any                       it is the run; resuming compares it (see `resume`)
    missing            none                      a new run begins
    missing, damaged   one can be read           the newest one's run is written into run.json again
    missing            none can be read          the error of the newest snapshot
    damaged            none, none can be read    an error

`run.json` is replaced in one step while the lease is held, before the first report. A crash leaves
no file, and then nothing has the id yet, or the whole file.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

import msgspec
from msgspec import Struct

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate.summary import Count
from stream_ctr.snapshots import files, snapshot
from stream_ctr.snapshots.contract import NewerFormat, RunId, decode, encode

_log = logging.getLogger(__name__)
FORMAT = 2
RUN_FILE = "run.json"


class RunFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of `run.json`."""

    format: Count = FORMAT
    run: RunId


def run_of(directory: Path) -> str:
    """Return the run of a state directory; begin one if nothing was written there.

    Only the owner of the directory may call this. Raises `SnapshotError` if the id is lost, and
    `NewerFormat` if a newer version wrote it.
    """
    path = directory / RUN_FILE
    damage = None
    try:
        return decode(files.read_document(path), RunFile, newest=FORMAT, name=str(path)).run
    except NewerFormat:
        raise
    except files.Missing:
        pass
    except SnapshotError as error:
        damage = error
    run = _run_of_newest(directory / "snapshots")
    if run is None and damage:
        raise SnapshotError(
            f"{damage}; there is no snapshot that holds the run's id too, so nothing was published "
            "that could be resumed: begin anew with another state directory"
        )
    if run and damage:
        _log.warning("%s; its snapshots are of run %s, which goes on", damage, run)
    run = run or new_run()
    files.replace_durably(path, encode(RunFile(run=run)))
    return run


def new_run() -> str:
    """Return the id of a new run.

    >>> len(new_run())
    32
    """
    return secrets.token_hex(16)


def require_run_id(text: str) -> str:
    """Return `text` if it is the id of a run. Raises `ValueError` otherwise.

    >>> require_run_id("3F")
    Traceback (most recent call last):
    ValueError: '3F' is not the id of a run, which has 32 digits of 0-9 and a-f
    """
    try:
        return msgspec.convert(text, RunId)
    except msgspec.ValidationError:
        raise ValueError(
            f"{text!r:.80} is not the id of a run, which has 32 digits of 0-9 and a-f"
        ) from None


def _run_of_newest(root: Path) -> str | None:
    """Return the run of the newest snapshot that can be read, or None if there is no snapshot.

    Raises `SnapshotError` if there are snapshots, and none can be read.
    """
    reason: SnapshotError | None = None
    for name in reversed(snapshot.snapshot_ids(root)):
        try:
            return snapshot.read_manifest(root / name).run
        except NewerFormat:
            raise
        except SnapshotError as error:
            reason = reason or error
    if reason:
        raise reason
    return None
