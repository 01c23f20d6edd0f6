"""The command `export`: a snapshot for servers that have no torch, or none of this code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stream_ctr.cli.options import ALLOW_MODEL_OPTION, MODEL_OPTION, PUBLIC_KEY_OPTION, GivenPath
from stream_ctr.errors import SnapshotError

if TYPE_CHECKING:
    from stream_ctr.snapshots.contract import Verify


@click.command()
@click.argument("path", metavar="SNAPSHOT", type=GivenPath(file_okay=False))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "torch"]),
    default="onnx",
    show_default=True,
    help="A snapshot with ONNX graphs, or a folder with files of torch.export.",
)
@MODEL_OPTION
@ALLOW_MODEL_OPTION
@PUBLIC_KEY_OPTION
@click.option(
    "--signing-key",
    "key_path",
    type=GivenPath(),
    help="Sign the new snapshot with this private key, for servers with --public-key.",
)
def export(
    *,
    path: Path,
    out: Path,
    form: str,
    model: str | None,
    public_key: Path | None,
    key_path: Path | None,
) -> None:
    """Write what serving SNAPSHOT needs to the new directory OUT, for a server without torch.

    SNAPSHOT is a snapshot directory, or a state directory for its newest. OUT is a snapshot with
    the weights that serving needs and an ONNX graph of each network. `score`, `Scorer` and every
    other reader of a snapshot take it, but no run resumes from it.

    With --format torch, OUT is a folder with a .pt2 file of each network, which torch.export.load
    reads: from the rows of the table, w and v, to logits.

    \b
    stream-ctr export state served
    stream-ctr export state/snapshots/00000003-20250101T101500Z served --model deepfm
    stream-ctr export state programs --format torch
    """
    from stream_ctr.learn.runtimes import graph_builder, program_builder
    from stream_ctr.snapshots.export import export_programs, export_snapshot
    from stream_ctr.snapshots.signing import SigningKey, verifier

    if form == "torch" and key_path:
        raise click.UsageError("--signing-key signs a manifest, and --format torch writes none")
    build = graph_builder() if form == "onnx" else program_builder()
    signature = verifier(public_key)
    sign = SigningKey(key_path).sign if key_path else None
    path = chosen_snapshot(path, signature)
    if form == "torch":
        for program in export_programs(path, out, build, model=model, signature=signature):
            click.echo(program)
        return
    click.echo(export_snapshot(path, out, build, model=model, signature=signature, sign=sign))


def chosen_snapshot(path: Path, signature: Verify | None) -> Path:
    """Return the snapshot at `path`, or the newest one of the state directory at `path`.

    Raises `SnapshotError` if there is none, or if none verifies.
    """
    from stream_ctr.snapshots import snapshot

    if not path.is_dir() or (path / "manifest.json").exists():
        return path
    newest = snapshot.newest(path / "snapshots", signature=signature)
    if newest is None:
        raise SnapshotError(
            f"{path} is not a snapshot, because it has no manifest.json, "
            "and no run has left one in it"
        )
    return newest
