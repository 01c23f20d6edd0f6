"""The command `compact`: a snapshot and its deltas become one snapshot that serves."""

from __future__ import annotations

from pathlib import Path

import click

from stream_ctr.cli import voice
from stream_ctr.cli.options import PUBLIC_KEY_OPTION, GivenPath


@click.command()
@click.option(
    "--state",
    "directory",
    type=GivenPath(file_okay=False),
    required=True,
    help="The state directory of a run.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The new directory of the snapshot.",
)
@PUBLIC_KEY_OPTION
@click.option(
    "--signing-key",
    "key_path",
    type=GivenPath(),
    help="Sign the new snapshot with this private key, for servers with --public-key.",
)
def compact(*, directory: Path, out: Path, public_key: Path | None, key_path: Path | None) -> None:
    """Write the published snapshot, with all deltas after it, as one snapshot.

    The new snapshot holds what serving needs of each model, as that of `export` does, and its
    manifest says after which delta it stands. No run resumes from it.

    \b
    stream-ctr compact --state state --out served
    """
    from stream_ctr.learn.runtimes import graph_builder
    from stream_ctr.snapshots.compaction import compact as compacted
    from stream_ctr.snapshots.signing import SigningKey, verifier

    done = compacted(
        directory,
        out,
        graph_builder(),
        signature=verifier(public_key),
        sign=SigningKey(key_path).sign if key_path else None,
    )
    for reason in done.left_out:
        voice.say(f"warning: left out: {reason}")
    after = f"to {done.position.rank.name}" if done.position else "since it was published"
    voice.say(f"snapshot {done.base} with {done.deltas} deltas, {after}")
    click.echo(done.path)
