"""Models of a snapshot for servers that have no torch, or none of our code.

    graphs_of         the ONNX graphs of a run's networks, which a snapshot may hold
    export_snapshot   a smaller snapshot, with what serving needs and the graphs
    export_programs   a folder with a file of `torch.export` for each network

LR has neither graph nor program: it is predicted from its table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from stream_ctr.errors import SnapshotError
from stream_ctr.learn.dense_part import PARTS
from stream_ctr.learn.served_network import require_weights
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import Tensors
from stream_ctr.messages import one_line
from stream_ctr.snapshots import files, snapshot
from stream_ctr.snapshots.contract import Sign, Verify
from stream_ctr.snapshots.manifest import Manifest, RunIdentity
from stream_ctr.snapshots.scorer import served_stems

Build: TypeAlias = Callable[[LearnerSpec, Tensors], bytes]
"""Builds the graph or the program of a dense part (see `learn.runtimes`)."""
Named: TypeAlias = Mapping[str, Mapping[str, npt.NDArray[np.generic]]]
"""File stem -> name -> array."""

PROGRAM_SUFFIX = ".pt2"


def graphs_of(identity: RunIdentity, tensors: Named, build: Build) -> dict[str, bytes]:
    """Return what `build` makes of each network among `tensors`, by file stem."""
    names = {
        snapshot.stems(None if name == identity.published else name)[0]: name
        for name in identity.specs
    }
    specs = {stem: identity.specs[name] for stem, name in names.items() if stem in tensors}
    return {stem: build(spec, tensors[stem]) for stem, spec in specs.items() if spec.model != "lr"}


def export_snapshot(
    path: Path,
    out: Path,
    build: Build,
    *,
    model: str | None = None,
    signature: Verify | None = None,
    sign: Sign | None = None,
) -> Path:
    """Write what serving the snapshot at `path` needs to the directory `out`, with ONNX graphs.

    It holds the weights of the published model, with those of a blend's members, or of the
    additional `model`. `Scorer` loads it as it loads any snapshot; no run resumes from it.
    `signature` must accept the manifest of the snapshot, and `sign` signs that of the new one.

    Raises `SnapshotError` if the snapshot does not verify, if its weights are not those of its
    models, or if `out` exists or cannot be written.
    """
    manifest, tensors = _load(path, model, signature)
    graphs = _built(path, manifest, tensors, build)
    return snapshot.write(
        out.parent,
        tensors=tensors,
        manifest=msgspec.structs.replace(manifest, files={}),
        graphs=graphs,
        sign=sign,
        name=out.name,
    )


def export_programs(
    path: Path,
    out: Path,
    build: Build,
    *,
    model: str | None = None,
    signature: Verify | None = None,
) -> list[Path]:
    """Write a `.pt2` file for each network of the snapshot at `path` into the new folder `out`.

    Returns their paths. `model` and errors are those of `export_snapshot`.
    """
    manifest, tensors = _load(path, model, signature)
    programs = _built(path, manifest, tensors, build)
    if not programs:
        raise SnapshotError(f"the model of snapshot {path} is LR, which has no network to export")
    written = [out / f"{stem}{PROGRAM_SUFFIX}" for stem in programs]
    with files.naming(out, "cannot export to"):
        out.mkdir(parents=True)
        for file, program in zip(written, programs.values(), strict=True):
            files.write_durably(file, program)
        files.sync_directory(out)
    return written


def _load(
    path: Path, model: str | None, signature: Verify | None
) -> tuple[Manifest, dict[str, dict[str, npt.NDArray[Any]]]]:
    return snapshot.load(
        path,
        stems=lambda manifest: served_stems(manifest, model),
        signature=signature,
        any_name=True,
    )


def _checked(build: Build, spec: LearnerSpec, weights: Tensors) -> bytes:
    if spec.model in PARTS:
        require_weights(spec, weights)
    return build(spec, weights)


def _built(path: Path, manifest: Manifest, tensors: Named, build: Build) -> dict[str, bytes]:
    try:
        return graphs_of(manifest, tensors, partial(_checked, build))
    except (KeyError, ValueError, RuntimeError) as error:
        raise SnapshotError(
            f"snapshot {path} does not describe a model that this version can build: "
            f"{one_line(error, 500)}"
        ) from None
