"""Served weights in plain arrays, and deltas that are applied to them without any predictor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from stream_ctr.learn.served_weights import served_weights, serving_sha256
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.delta import (
    DeltaHeader,
    DeltaPosition,
    decode_header,
    decode_payload,
    header_sha256,
)
from stream_ctr.snapshots.delta_store import DeltaStore
from stream_ctr.snapshots.manifest import Manifest

Array = npt.NDArray[Any]
Plain = dict[str, dict[str, Array]]
"""File stem -> name -> array. The weights of LR are a row each of its table."""


class Link(NamedTuple):
    """A delta in a state directory."""

    header: DeltaHeader
    sha256: str
    payload: bytes

    @property
    def position(self) -> DeltaPosition:
        return DeltaPosition(self.header.rank, self.sha256)


def links(state: Path) -> list[Link]:
    """Return the deltas of a state directory, in the order of their ranks."""
    store = DeltaStore(state)
    found = []
    for entry in store.index.deltas if store.index else ():
        data = (store.folder / f"{entry.rank.name}.json").read_bytes()
        payload = (store.folder / f"{entry.rank.name}.safetensors").read_bytes()
        assert header_sha256(data) == entry.sha256
        found.append(Link(decode_header(data), entry.sha256, payload))
    return found


def plain_weights(path: Path) -> tuple[Manifest, Plain]:
    """Return the manifest of a snapshot, and what serving reads of its models."""
    manifest, tensors = snapshot.load(path)
    plain: Plain = {}
    if manifest.blend:
        plain["model"] = dict(tensors["model"])
    for name, spec in manifest.specs.items():
        stem = snapshot.stems(None if name == manifest.published else name)[0]
        if stem not in tensors:
            continue
        served = {name: array.copy() for name, array in served_weights(spec, tensors[stem]).items()}
        if spec.model == "lr":
            bits = spec.table_bits if spec.pairs is UNSET else spec.pairs.table_bits
            table = np.zeros(1 << bits, np.float32)
            table[served.pop("rows")] = served["values"]
            served["values"] = table
        plain[stem] = served
    return manifest, plain


def apply(plain: Plain, link: Link) -> None:
    """Write the values of a delta over the rows, and replace the other arrays."""
    for stem, named in decode_payload(link.payload, link.header.precision).items():
        for name, array in named.items():
            if name == "values":
                plain[stem]["values"][named["rows"]] = array
            elif name != "rows":
                assert plain[stem][name].shape == array.shape
                assert plain[stem][name].dtype == array.dtype
                plain[stem][name] = array


def digests(plain: Plain) -> dict[str, str]:
    """Return `serving_sha256` of each model."""
    return {stem: serving_sha256(_sparse(named)) for stem, named in plain.items()}


def _sparse(named: Mapping[str, Array]) -> dict[str, Array]:
    found = dict(named)
    if "values" in found and found["values"].ndim == 1:
        rows = np.flatnonzero(found["values"])
        found |= {"rows": rows.astype(np.uint32), "values": found["values"][rows]}
    return found


def digest_of(path: Path) -> str:
    """Return the SHA-256 of the manifest of a snapshot."""
    return header_sha256((path / "manifest.json").read_bytes())


def assert_chains_hold(state: Path) -> int:
    """Assert that every delta follows its parent, and leads to the snapshots that say so.

    Returns the number of snapshots that base and deltas were compared with.
    """
    paths = [state / "snapshots" / name for name in snapshot.snapshot_ids(state / "snapshots")]
    positions = {path: snapshot.read_manifest(path).delta for path in paths}
    compared = 0
    chains: dict[tuple[str, int], list[Link]] = {}
    for link in links(state):
        chains.setdefault((link.header.base_sha256, link.header.rank.epoch), []).append(link)
    for (base_sha256, _), chain in chains.items():
        parents = [base_sha256, *(link.sha256 for link in chain)]
        assert [link.header.parent for link in chain] == parents[:-1]
        base = [path for path in paths if digest_of(path) == base_sha256]
        if base:
            compared += _compare(base[0], chain, positions)
    return compared


def _compare(
    base: Path, chain: Iterable[Link], positions: Mapping[Path, DeltaPosition | None]
) -> int:
    compared = 0
    manifest, plain = plain_weights(base)
    assert digests(plain) == manifest.serving_sha256
    for link in chain:
        apply(plain, link)
        for path, position in positions.items():
            if position == link.position:
                following, expected = plain_weights(path)
                for stem, named in expected.items():
                    for name, array in named.items():
                        assert np.array_equal(array, plain[stem][name]), (stem, name)
                assert digests(plain) == following.serving_sha256
                compared += 1
    return compared
