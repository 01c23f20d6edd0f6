"""The scorer: a model that is rebuilt from a snapshot and predicts click probabilities."""

from __future__ import annotations

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
from stream_ctr.learn.blend import Blend, BlendPredictor
from stream_ctr.learn.predictor import Predictor
from stream_ctr.learn.runtimes import Runtime, choose_runtime, make_predictor
from stream_ctr.learn.spec import BLEND
from stream_ctr.messages import one_line
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.contract import Verify
from stream_ctr.snapshots.manifest import Manifest, RunIdentity


class Scorer:
    """The model of one snapshot, ready to predict: the published one, or the additional `model`.

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

    Raises `SnapshotError` if the snapshot does not hold it.
    """
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
