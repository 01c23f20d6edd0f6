"""The dense part of a model, computed by onnxruntime.

onnxruntime runs ONNX graphs on every platform and needs no torch: its wheel is a few tens of
megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime

from stream_ctr.learn.dense_part import PARTS
from stream_ctr.learn.onnx_check import require_graph
from stream_ctr.learn.onnx_graph import LOGITS, build_graph
from stream_ctr.learn.served_network import Dense, Part, ServedNetwork, require_weights
from stream_ctr.learn.shared_rows import Floats
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import Tensors
from stream_ctr.messages import one_line

_ONLY_FATAL = 4
_EXAMPLES = 3
_ROWS = 1024
"""The rows that are computed at once, which bounds the memory of a large request."""


class OnnxDense:
    """The dense part in a serialised graph: `w` [n, F + C], `v` [n, F + C, width] -> logits [n].

    `threads` share an operation. With one, a server's own threads do not wait for each other; a
    call releases the interpreter's lock. Raises `ValueError` if onnxruntime refuses the graph.
    """

    def __init__(self, graph: bytes, *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ONLY_FATAL  # errors are raised
        try:
            self._session = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # noqa: BLE001 - its errors have no base of their own
            raise ValueError(f"onnxruntime refuses the graph: {one_line(error)}") from None

    def __call__(self, w: Floats, v: Floats) -> Floats:
        logits: Floats = self._session.run([LOGITS], {"w": w, "v": v})[0]
        return logits


class OnnxEngine:
    """Computes the dense part of the model that `spec` describes by a graph that is made of it.

    `threads` are those of `OnnxDense`.
    """

    def __init__(self, spec: LearnerSpec, *, threads: int = 1) -> None:
        self._spec = spec
        self._threads = threads

    def dense(self, parameters: Tensors) -> Dense:
        """Return the dense part with these parameters."""
        return OnnxDense(build_graph(self._spec, parameters), threads=self._threads)

    def parts(self, n: int) -> Sequence[Part]:
        """Return parts of 1,024 examples, and one of those that are left.

        >>> OnnxEngine(LearnerSpec(fields=2)).parts(1500)
        [Part(start=0, stop=1024, rows=1024), Part(start=1024, stop=1500, rows=476)]
        """
        stops = ((start, min(start + _ROWS, n)) for start in range(0, n, _ROWS))
        return [Part(start, stop, stop - start) for start, stop in stops]

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Run the tasks one after another, in the caller's thread."""
        for task in tasks:
            task()


def onnx_predictor(
    spec: LearnerSpec, weights: Tensors, *, graph: bytes | None = None, threads: int = 1
) -> ServedNetwork:
    """Return the network that `spec` describes, with its `graph` or one that is made here.

    A graph that is given may come from a stranger, and is checked first (see `onnx_check`).
    Raises `ConfigError` for a model of another package, and `ValueError` if weights or graph are
    not those of the model.
    """
    require_weights(spec, weights)
    engine = OnnxEngine(spec, threads=threads)
    if graph is None:
        dense = engine.dense(weights)
    else:
        require_graph(graph, spec, weights)
        dense = OnnxDense(graph, threads=threads)
    _require_logits(dense, spec)
    return ServedNetwork(spec, weights, engine, dense=dense)


def _require_logits(dense: Dense, spec: LearnerSpec) -> None:
    """Raise `ValueError` unless the dense part gives a logit for each of a few examples."""
    part = PARTS[spec.model]
    w = np.zeros((_EXAMPLES, part.columns(spec)), np.float32)
    v = np.zeros((*w.shape, part.width(spec)), np.float32)
    try:
        shape = dense(w, v).shape
    except Exception as error:  # noqa: BLE001 - its errors have no base of their own
        raise ValueError(f"onnxruntime cannot run the graph: {one_line(error)}") from None
    if shape != (_EXAMPLES,):
        raise ValueError(f"the graph gives {list(shape)} for {_EXAMPLES} examples, not logits")
