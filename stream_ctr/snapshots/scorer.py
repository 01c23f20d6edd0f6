"""The scorer: a model that is rebuilt from a snapshot and predicts click probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stream_ctr.errors import SnapshotError
from stream_ctr.evaluate import metrics
from stream_ctr.events.features import Hasher
from stream_ctr.learn.learner import make_learner, require_shapes
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.manifest import Manifest

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
        self.manifest, named = snapshot.load(
            path,
            stems=lambda manifest: [_stem(manifest, model)],
            manifest_sha256=manifest_sha256,
            signature=signature,
        )
        (tensors,) = named.values()
        self.fields = self.manifest.schema.fields
        spec = self.manifest.spec(model)
        try:
            self.hasher = Hasher(**msgspec.structs.asdict(self.manifest.schema))
            _require_bounds(tensors, spec)
            self.learner = make_learner(spec, device=device, serving=True)
            self.learner.load_weights(tensors)
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
        return metrics.probabilities(self.learner.predict(ids, values).astype(np.float64))


def _stem(manifest: Manifest, model: str | None) -> str:
    """Return the stem of the file with the weights of `model`."""
    if model is None or model == manifest.learner.model:
        return snapshot.stems()[0]
    if model not in manifest.beside:
        present = ", ".join(
            one_line(name, 60) for name in (manifest.learner.model, *manifest.beside)
        )
        raise SnapshotError(f"the snapshot has no model {model!r:.80}; it has {present}")
    stem = snapshot.stems(model)[0]
    if snapshot.file_name(stem) not in manifest.files:
        raise SnapshotError(
            f"the snapshot was taken without the model {model!r:.80}, which had diverged"
        )
    return stem


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
