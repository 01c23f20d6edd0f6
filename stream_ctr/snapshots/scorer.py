"""The scorer: a model that is rebuilt from a snapshot and predicts click probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, overload

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.errors import ConfigError, SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.events.feature_rows import FeatureRows, OnInvalid, Table
from stream_ctr.events.features import Hasher
from stream_ctr.learn.blend import Blend, BlendPredictor
from stream_ctr.learn.learner import Learner, make_learner, require_shapes
from stream_ctr.learn.spec import BLEND, LearnerSpec
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.manifest import Manifest, RunIdentity

_LARGEST_BATCH = 1 << 20


class Scorer:
    """The model of one snapshot, ready to predict: the published one, or the additional `model`.

    With `on_invalid="error"`, features that are not what the model learned from raise
    `InvalidFeatures`. With "score" they count as missing, and `invalid` counts them by reason (see
    `events.feature_rows`); a Counter that is given here is used for that.

    Raises `SnapshotError` if the snapshot does not verify, or if its tensors do not fit its
    manifest.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: str | None = None,
        manifest_sha256: str | None = None,
        signature: Verify | None = None,
        device: str = "cpu",
        on_invalid: OnInvalid = "error",
        invalid: Counter[str] | None = None,
    ) -> None:
        self.manifest, tensors = snapshot.load(
            path,
            stems=lambda manifest: _stems(manifest, model),
            manifest_sha256=manifest_sha256,
            signature=signature,
            any_name=True,
        )
        self.fields = self.manifest.schema.fields
        self._rows = FeatureRows(self.fields, on_invalid=on_invalid, invalid=invalid)
        try:
            self.hasher = Hasher(**msgspec.structs.asdict(self.manifest.schema))
            self.model = build_predictor(self.manifest, tensors, model, device=device)
        except ConfigError as error:  # a model of another package
            raise SnapshotError(
                f"snapshot {path} cannot be served: {one_line(error, 500)}"
            ) from None
        except (TypeError, ValueError, RuntimeError, MemoryError) as error:
            raise SnapshotError(
                f"snapshot {path} does not describe a model that this version can build: "
                f"{one_line(error, 500)}"
            ) from None

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
        blocks = [self.hasher.rows(columns) for columns in self._rows.columns(rows)]
        if len(blocks) == 1:
            return blocks[0]
        none = {field.name: pa.nulls(0) for field in self.fields}
        ids, values = zip(*(blocks or [self.hasher.rows(none)]), strict=True)
        return np.concatenate(ids), np.concatenate(values)

    def predict_ids(
        self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        """Return the click probabilities [n] of impressions with these `ids` and `values`."""
        return metrics.probabilities(self.model.predict(ids, values).astype(np.float64))


class Predictor(Protocol):
    """A model that predicts."""

    def predict(
        self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.floating]:
        """Return the logits [n] of examples with `ids` [n, F + C] and `values` [n, V]."""
        ...


def build_predictor(
    identity: RunIdentity,
    tensors: Mapping[str, Mapping[str, npt.NDArray[np.generic]]],
    model: str | None = None,
    *,
    device: str = "cpu",
) -> Predictor:
    """Return the published model of a run, or the additional `model`.

    `tensors` maps file stems to the arrays of weights. Members of a blend without a file were left
    out of the run. Raises `ValueError` or `RuntimeError` if the arrays do not fit, before any
    memory is taken for the model.
    """
    if (model or identity.published) != BLEND:
        name = model or identity.published
        weights = tensors[snapshot.stems(None if name == identity.published else name)[0]]
        return _learner(identity.specs[name], weights, device)
    blend = Blend(identity.blend)
    blend.load_weights(tensors[snapshot.stems()[0]])
    stems = {name: snapshot.stems(name)[0] for name in identity.blend}
    members = {
        name: _learner(identity.specs[name], tensors[stem], device)
        for name, stem in stems.items()
        if stem in tensors
    }
    return BlendPredictor(blend, members)


def _learner(
    spec: LearnerSpec, weights: Mapping[str, npt.NDArray[np.generic]], device: str
) -> Learner:
    _require_bounds(weights, spec)
    learner = make_learner(spec, device=device, serving=True)
    learner.load_weights(weights)
    if device != "cpu":
        # A GPU's first prediction compiles and records, and no request should wait for that.
        values = np.zeros((1, len(spec.value_fields)), np.float32)
        learner.predict(np.zeros((1, spec.fields + spec.crosses), np.int32), values)
    return learner


def _stems(manifest: Manifest, model: str | None) -> list[str]:
    """Return the stems of the files with the weights of `model`."""
    published = manifest.published
    if model is None or model == published:
        members = [snapshot.stems(name)[0] for name in manifest.blend]
        present = [stem for stem in members if snapshot.file_name(stem) in manifest.files]
        return [snapshot.stems()[0], *present]
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


def _require_bounds(weights: Mapping[str, npt.NDArray[np.generic]], spec: LearnerSpec) -> None:
    """Raise `ValueError` for a specification that its weights contradict, or that is too large.

    This comes before any memory is allocated for the model.
    """
    if spec.batch_size > _LARGEST_BATCH:
        raise ValueError(f"a batch of {spec.batch_size}")
    try:
        require_shapes(weights, spec)
    except KeyError as missing:
        raise ValueError(f"tensor {missing} is missing") from None
