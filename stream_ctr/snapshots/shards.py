"""The shards of a cut on their way into a snapshot.

    begin      rank 0 makes a folder for each table that ranks hold together, beside the snapshots;
               all ranks begin to write their shards into it
    written    all shards are on disk; they move into the snapshot as segments do, before its
               manifest, which lists them, is written
    remove     what did not move is removed, when no rank writes any more

The folders have names of unfinished snapshots: the next run removes what a crash leaves.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from stream_ctr import state_files
from stream_ctr.errors import SnapshotError, StreamCtrError
from stream_ctr.learn.shard_writer import ShardsWritten, TableShards
from stream_ctr.snapshots import files, snapshot


class StagedShards:
    """The shards of snapshot `name`, by the stem of each table, written under `root` by all ranks.

    It begins when it is made, in the loop of rank 0. Another thread waits for it.
    """

    def __init__(self, root: Path, name: str, shards: Mapping[str, TableShards]) -> None:
        self._name = name
        self._shards: dict[str, TableShards] = {}
        self._folders: dict[str, Path] = {}
        self._problem: SnapshotError | None = None
        try:
            for stem, each in shards.items():
                folder = root.absolute() / f"{files.TEMPORARY}{snapshot.OWN}-{stem}"
                with files.naming(folder, "cannot write shards to"):
                    state_files.make_folder(root)
                    files.remove(folder)
                    folder.mkdir()
                self._folders[stem] = folder
                each.begin(folder, stem)
                self._shards[stem] = each
        except SnapshotError as problem:  # for those who wait
            self._problem = problem

    def written(self) -> dict[str, ShardsWritten]:
        """Return what the ranks wrote, by stem.

        Raises `SnapshotError` if one could not write, and `RankError` if one has ended.
        """
        try:
            if self._problem:
                raise self._problem
            return {stem: shards.written() for stem, shards in self._shards.items()}
        except SnapshotError as problem:
            raise SnapshotError(
                f"cannot write snapshot {self._name}: {problem}; nothing was left behind"
            ) from None

    def remove(self) -> None:
        """Wait until no rank writes any more, and remove what is left."""
        for shards in self._shards.values():
            try:
                shards.written()
            except StreamCtrError:  # `written` has raised it
                continue
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def segments_of(
    written: Mapping[str, ShardsWritten], stems: Collection[str]
) -> dict[str, tuple[Path, str, int]]:
    """Return the files of these shards, as the segments that `snapshot.write` moves in."""
    return {
        name: file
        for stem, each in written.items()
        if stem in stems
        for name, file in each.files.items()
    }
