"""The scorer: a model that is rebuilt from a snapshot and predicts click probabilities."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.events.feature_rows import FeatureRows, OnInvalid, Table
from stream_ctr.events.features import Hasher
from stream_ctr.learn.blend import MIXTURE, Blend, BlendPredictor
from stream_ctr.learn.predictor import Predictor
from stream_ctr.learn.runtimes import Runtime, choose_runtime, make_predictor
from stream_ctr.learn.served_weights import serving_sha256
from stream_ctr.learn.spec import BLEND
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.delta import Changes, DeltaHeader
from stream_ctr.snapshots.manifest import Manifest, RunIdentity


class Scorer:
    """The model of one snapshot, ready to predict: the published one, or the additional `model`.

    A scorer never changes what it predicts. `updated` returns another one, which has learned what a
    delta says.

    With `on_invalid="error"`, features that are not what the model learned from raise
    `InvalidFeatures`. With "score" they count as missing, and `invalid` counts them by reason (see
    `events.feature_rows`); a Counter that is given here is used for that. `runtime` names the
    library that computes the network, by default torch where it is installed, else onnx (see
    `learn.runtimes`).

    Raises `ConfigError` if the runtime is not installed, and `SnapshotError` if the snapshot does
    not verify, or if its tensors do not fit its manifest.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: str | None = None,
        manifest_sha256: str | None = None,
        signature: Verify | None = None,
        device: str = "cpu",
        runtime: Runtime | None = None,
        on_invalid: OnInvalid = "error",
        invalid: Counter[str] | None = None,
    ) -> None:
        self.runtime = choose_runtime(runtime, device=device)
        self.manifest, tensors = snapshot.load(
            path,
            stems=lambda manifest: served_stems(manifest, model),
            manifest_sha256=manifest_sha256,
            signature=signature,
            any_name=True,
            partial=True,
        )
        self.fields = self.manifest.schema.fields
        self._rows = FeatureRows(self.fields, on_invalid=on_invalid, invalid=invalid)
        try:
            self.hasher = Hasher(**msgspec.structs.asdict(self.manifest.schema))
            self.model = build_predictor(
                self.manifest,
                tensors,
                model,
                runtime=self.runtime,
                device=device,
                graphs=(
                    snapshot.graphs(path, self.manifest, tensors) if self.runtime == "onnx" else {}
                ),
            )
        except ConfigError as error:  # a model of another package, or one that needs torch
            raise SnapshotError(
                f"snapshot {path} cannot be served: {one_line(error, 500)}"
            ) from None
        except (TypeError, ValueError, RuntimeError, MemoryError) as error:
            raise SnapshotError(
                f"snapshot {path} does not describe a model that this version can build: "
                f"{one_line(error, 500)}"
            ) from None
        self._stems = dict(zip(served_names(self.manifest, model), tensors, strict=True))
        self.snapshot = self.manifest.snapshot
        """The name of the snapshot that this model follows from, by the deltas up to `delta`."""
        self.delta: DeltaHeader | None = None
        """The header of the last delta that was applied, None for the model of the snapshot."""

    @property
    def invalid(self) -> Counter[str]:
        """The number of invalid values, names and rows that were scored as missing, by reason."""
        return self._rows.invalid

    @overload
    def predict(self, rows: Mapping[str, object]) -> float: ...
    @overload
    def predict(self, rows: Sequence[Mapping[str, object]] | Table) -> npt.NDArray[np.float64]: ...
    def predict(
        self, rows: Mapping[str, object] | Sequence[Mapping[str, object]] | Table
    ) -> float | npt.NDArray[np.float64]:
        """Return the click probabilities [n] of n impressions, or that of one.

        An impression maps field names to values; an absent value or None is missing. `rows` is one
        such dictionary, whose probability is a float, a sequence of them, or a table with a column
        for each field: pandas, polars, Arrow, or anything else that exports an Arrow stream.

        Raises `InvalidFeatures`, unless `on_invalid` is "score".
        """
        blocks = [self.predict_columns(columns) for columns in self._rows.columns(rows)]
        if isinstance(rows, Mapping):
            return float(blocks[0][0])
        return np.concatenate(blocks) if blocks else np.empty(0)

    def predict_columns(self, features: Mapping[str, pa.Array]) -> npt.NDArray[np.float64]:
        """Return the click probabilities [n] of impressions that are given as columns.

        Categorical fields are columns of strings, numeric ones of float64.
        """
        return self.predict_ids(*self.hasher.rows(features))

    def ids(
        self, rows: Sequence[Mapping[str, object]] | Table
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return the `ids` int32 [n, F + C] and the `values` float32 [n, V] of n impressions.

        They are what `predict_ids` takes. `rows` and errors are those of `predict`.
        """
        columns = list(self._rows.columns(rows)) or list(self._rows.columns([]))
        blocks = [self.hasher.rows(each) for each in columns]
        if len(blocks) == 1:
            return blocks[0]
        ids, values = zip(*blocks, strict=True)
        return np.concatenate(ids), np.concatenate(values)

    def predict_ids(
        self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        """Return the click probabilities [n] of impressions with these `ids` and `values`."""
        return metrics.probabilities(self.model.predict(ids, values).astype(np.float64))

    def updated(self, changes: Changes, header: DeltaHeader) -> Scorer:
        """Return the scorer after a delta; this one predicts as before.

        `changes` are those of `delta.decode_payload`, of which a scorer of an additional model
        takes that model's. Both scorers share their rows (see `absorb`). The time depends on the
        rows that changed, not on those of the table.

        Raises `ValueError`, with nothing changed, if the changes are not those of this model, and
        `ConfigError` for a model on a GPU.
        """
        scorer = copy.copy(self)
        scorer.model = self._updated_model(changes)
        scorer.delta = header
        return scorer

    def _updated_model(self, changes: Changes) -> Predictor | BlendPredictor:
        for stem in self._stems.values():
            if stem not in changes:
                raise ValueError(f"the delta has nothing of {snapshot.file_name(stem)}")
        if isinstance(self.model, BlendPredictor):
            return self.model.updated({name: changes[stem] for name, stem in self._stems.items()})
        (stem,) = self._stems.values()
        return self.model.updated(changes[stem])

    def absorb(self) -> bool:
        """Write the rows of applied deltas into the table, if no older scorer can read it any more.

        Return whether there is nothing left to write. Until then, a prediction reads these rows
        beside the table. One thread at a time may call `updated` and `absorb`, while others
        predict.
        """
        return self.model.absorb()

    def following(self, snapshot_name: str) -> Scorer:
        """Return this scorer as one that follows from another snapshot of the chain."""
        scorer = copy.copy(self)
        scorer.snapshot = snapshot_name
        return scorer

    def serving_sha256(self) -> dict[str, str]:
        """Return the digest of what serving reads of each model, by its file stem.

        Two scorers of one run with equal digests make equal predictions. A snapshot's manifest has
        the digests of its models.
        """
        parts: dict[str, Predictor | BlendPredictor] = {MIXTURE: self.model}
        if isinstance(self.model, BlendPredictor):
            parts |= self.model.members
        return {stem: serving_sha256(parts[name].served()) for name, stem in self._stems.items()}


def build_predictor(
    identity: RunIdentity,
    tensors: Mapping[str, Mapping[str, npt.NDArray[np.generic]]],
    model: str | None = None,
    *,
    runtime: Runtime,
    device: str = "cpu",
    graphs: Mapping[str, bytes],
) -> Predictor | BlendPredictor:
    """Return the published model of a run, or the additional `model`.

    `tensors` maps file stems to the arrays of weights, and `graphs` those that have one to their
    ONNX graphs. Members of a blend without a file were left out of the run. Raises `ValueError` or
    `RuntimeError` if the arrays do not fit, before any memory is taken for the model.
    """

    def made(name: str, stem: str) -> Predictor:
        return make_predictor(
            identity.specs[name],
            tensors[stem],
            runtime=runtime,
            device=device,
            graph=graphs.get(stem),
        )

    if (model or identity.published) != BLEND:
        name = model or identity.published
        return made(name, snapshot.stems(None if name == identity.published else name)[0])
    blend = Blend(identity.blend)
    blend.load_weights(tensors[snapshot.stems()[0]])
    stems = {name: snapshot.stems(name)[0] for name in identity.blend}
    members = {name: made(name, stem) for name, stem in stems.items() if stem in tensors}
    return BlendPredictor(blend, members)


def served_stems(manifest: Manifest, model: str | None) -> list[str]:
    """Return the stems of the files with the weights of `model`, by default the published one.

    Those of a blend's members follow that of the blend. Raises `SnapshotError` if the snapshot does
    not hold it.
    """
    published = manifest.published
    if model is None or model == published:
        return [snapshot.stems()[0], *(snapshot.stems(name)[0] for name in _present(manifest))]
    if model not in manifest.beside:
        models = ", ".join(
            one_line(name, 60) for name in dict.fromkeys([published, *manifest.beside])
        )
        raise SnapshotError(f"the snapshot has no model {model!r:.80}; it has {models}")
    stem = snapshot.stems(model)[0]
    if snapshot.file_name(stem) not in manifest.files:
        raise SnapshotError(
            f"the snapshot was taken without the model {model!r:.80}, which had diverged"
        )
    return [stem]


def served_names(manifest: Manifest, model: str | None) -> list[str]:
    """Return the names of the members with these files; that of the model itself is `MIXTURE`."""
    return [MIXTURE, *(_present(manifest) if model is None or model == manifest.published else ())]


def _present(manifest: Manifest) -> list[str]:
    """Return the members of a blend that the snapshot holds."""
    return [
        name
        for name in manifest.blend
        if snapshot.file_name(snapshot.stems(name)[0]) in manifest.files
    ]
