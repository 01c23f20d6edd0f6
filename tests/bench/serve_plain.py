"""The same DeepFM in plain torch, behind the same server; run by serve.py as a process of its own.

    python tests/bench/serve_plain.py STATE plain 64   # up to 64 requests are predicted at once
    python tests/bench/serve_plain.py STATE blend 1    # stream_ctr's own model, each request alone

`nn.EmbeddingBag`, `nn.Embedding` and `nn.Linear` with the weights of the snapshot, in torch's
inference mode, with as many threads as torch chooses. Reading requests and hashing features is that
of stream_ctr. The probabilities of both are compared before anything is served.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stream_ctr.http.address import Address
from stream_ctr.serve.server import Policy, PredictionServer
from stream_ctr.snapshots import snapshot
from stream_ctr.snapshots.scorer import Scorer
from stream_ctr.snapshots.subscriber import Subscriber

MODEL = "deepfm"
TOLERANCE = 1e-5
_LAYER = "dense.deep.layers."


class PlainDeepFM(nn.Module):
    """DeepFM as one would write it in torch: ids [B, F] -> probabilities [B]."""

    def __init__(
        self, table: Tensor, width: int, layers: list[nn.Module], intercept: float
    ) -> None:
        super().__init__()
        self.linear = nn.EmbeddingBag.from_pretrained(
            table[:, width : width + 1].clone(), mode="sum"
        )
        self.embeddings = nn.Embedding.from_pretrained(table[:, :width].clone())
        self.network = nn.Sequential(*layers)
        self.intercept = intercept

    def forward(self, ids: Tensor) -> Tensor:
        v = self.embeddings(ids)
        total = v.sum(1)
        pairs = 0.5 * (total.square().sum(1) - v.square().sum((1, 2)))
        logits = self.linear(ids).squeeze(1) + pairs + self.network(v.flatten(1)).squeeze(1)
        return torch.sigmoid(logits + self.intercept)


class PlainScorer:
    """The interface of a scorer that the server uses."""

    def __init__(self, path: Path) -> None:
        self._scorer = Scorer(path, model=MODEL)
        self.manifest = self._scorer.manifest
        self.fields = self._scorer.fields
        self.ids = self._scorer.ids
        self._model = _plain(path).eval()
        self._compare()

    def predict_ids(self, ids: Any, values: Any) -> Any:
        with torch.inference_mode():
            return self._model(torch.from_numpy(np.ascontiguousarray(ids))).double().numpy()

    def _compare(self) -> None:
        rows = 1 << self.manifest.schema.table_bits
        columns = len(self.fields) + len(self.manifest.schema.crosses)
        ids = np.random.default_rng(0).integers(0, rows, (1000, columns)).astype(np.int32)
        values = np.ones((1000, len(self.manifest.schema.value_fields)), np.float32)
        difference = np.abs(self.predict_ids(ids, values) - self._scorer.predict_ids(ids, values))
        if difference.max() > TOLERANCE:
            raise SystemExit(f"plain torch predicts otherwise, by up to {difference.max()}")


def _plain(path: Path) -> PlainDeepFM:
    manifest, tensors = snapshot.load(path)
    stem = snapshot.stems(None if manifest.published == MODEL else MODEL)[0]
    weights = {name: torch.from_numpy(np.array(array)) for name, array in tensors[stem].items()}
    numbers = sorted(
        int(name.removeprefix(_LAYER).partition(".")[0])
        for name in weights
        if name.startswith(_LAYER) and name.endswith(".weight")
    )
    layers: list[nn.Module] = []
    for number in numbers:
        weight = weights[f"{_LAYER}{number}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": weights[f"{_LAYER}{number}.bias"]})
        layers += [layer, nn.ReLU()]
    intercept = float(weights["intercept"][0]) if "intercept" in weights else 0.0
    width = manifest.specs[MODEL].embedding_dim
    return PlainDeepFM(weights["table"], width, layers[:-1], intercept)


class PlainSubscriber(Subscriber):
    """A subscriber whose model is the plain one."""

    plain: PlainScorer | None = None

    @property
    def scorer(self) -> Any:
        if self.plain is None:
            assert self.path
            self.plain = PlainScorer(self.path)
        return self.plain


def main() -> None:
    state, model, together = sys.argv[1:]
    plain = model == "plain"
    subscriber = PlainSubscriber(Path(state), model=MODEL) if plain else Subscriber(Path(state))
    server = PredictionServer(
        subscriber,
        Address("127.0.0.1", 0),
        model=MODEL if plain else None,
        policy=Policy(timeout_seconds=60.0, together=int(together)),
    )
    print(f"serving at http://{server.address}", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: server.stop())
    server.run()


if __name__ == "__main__":
    main()
