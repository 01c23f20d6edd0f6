"""The scorer: a model that is rebuilt from a snapshot and predicts click probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.events.features import Hasher
from stream_ctr.learn.blend import Blend, BlendPredictor
from stream_ctr.learn.learner import Learner, make_learner, require_shapes
from stream_ctr.learn.spec import BLEND, LearnerSpec
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest, RunIdentity

_LARGEST_BATCH = 1 << 20


class Scorer:
    """The model of one snapshot, ready to predict: the published one, or the additional `model`.

    Raises `SnapshotError` if the snapshot does not verify, or if its tensors do not fit its
    manifest.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: str | None = None,
        manifest_sha256: str | None = None,
        signature: snapshot.Verify | None = None,
        device: str = "cpu",
    ) -> None:
        self.manifest, tensors = snapshot.load(
            path,
            stems=lambda manifest: _stems(manifest, model),
            manifest_sha256=manifest_sha256,
            signature=signature,
        )
        self.fields = self.manifest.schema.fields
        try:
            self.hasher = Hasher(**msgspec.structs.asdict(self.manifest.schema))
            self.model = build_predictor(self.manifest, tensors, model, device=device)
        except (TypeError, ValueError, RuntimeError, MemoryError) as error:
            raise SnapshotError(
                f"snapshot {path} does not describe a model that this version can build: "
                f"{one_line(error, 500)}"
            ) from None

    def predict(self, rows: Sequence[Mapping[str, object]]) -> npt.NDArray[np.float64]:
        """Return the click probabilities [n] of n impressions.

        Each impression maps field names to values. An absent value or None is missing.
        """
        columns = {
            field.name: pa.array([_text(row.get(field.name)) for row in rows], pa.string())
            if field.kind == "categorical"
            else pa.array([row.get(field.name) for row in rows], pa.float64())
            for field in self.fields
        }
        return self.predict_columns(columns)

    def predict_columns(self, features: Mapping[str, pa.Array]) -> npt.NDArray[np.float64]:
        """Return the click probabilities [n] of impressions that are given as columns.

        Categorical fields are columns of strings, numeric ones of float64.
        """
        ids, values = self.hasher.rows(features)
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


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)
