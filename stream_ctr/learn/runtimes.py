"""The libraries that can compute the dense part of a served model, and the choice of one.

    runtime   needs                    serves
    -------   ----------------------   ----------------------------------------------------------
    torch     torch                    every model, also one of another package; CPU and GPU
    onnx      onnx and onnxruntime     the paper's nine systems and their blend; CPU, without torch

LR needs neither. A library is imported when a model is made, because an environment may have only
one of them, and torch takes a second.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

from stream_ctr.errors import ConfigError
from stream_ctr.learn.linear_model import ServedLinear
from stream_ctr.learn.predictor import Predictor
from stream_ctr.learn.spec import LearnerSpec
from stream_ctr.learn.tensors import Tensors
from stream_ctr.messages import nearest

Runtime = Literal["torch", "onnx"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

_NEEDS = {"torch": ("torch",), "onnx": ("onnx", "onnxruntime")}
_HOW = {"torch": "pip install torch", "onnx": "pip install 'stream-ctr[onnx]'"}
_CPU = ("cpu", "auto")


def choose_runtime(name: str | None = None, *, device: str = "cpu") -> Runtime:
    """Return the runtime of this name or, without one, torch where it is installed, else onnx.

    Raises `ConfigError` for a name that is none, for one whose libraries are not installed, and for
    a GPU where the runtime is onnx.

    >>> choose_runtime("onnx")
    'onnx'
    >>> choose_runtime("onx")
    Traceback (most recent call last):
    stream_ctr.errors.ConfigError: a runtime is torch or onnx, got 'onx'; did you mean 'onnx'?
    """
    if name is None:
        chosen: Runtime | None = next((each for each in RUNTIMES if not _missing(each)), None)
        if chosen is None:
            raise ConfigError(
                "serving a snapshot needs torch, or onnx and onnxruntime, and neither is "
                f"installed here: {_HOW['onnx']}, or {_HOW['torch']}"
            )
    elif name in RUNTIMES:
        chosen = RUNTIMES[RUNTIMES.index(name)]
        if missing := _missing(chosen):
            other = next(each for each in RUNTIMES if each != chosen)
            raise ConfigError(
                f"the runtime {chosen} needs {missing[0]}, which is not installed here: "
                f"{_HOW[chosen]}, or use the runtime {other}"
            )
    else:
        raise ConfigError(f"a runtime is torch or onnx, got {name!r:.80}{nearest(name, RUNTIMES)}")
    if chosen == "onnx" and device not in _CPU:
        raise ConfigError(
            f"the runtime onnx predicts on the CPU, got device {device!r:.80}; "
            "for a GPU, use the runtime torch"
        )
    return chosen


def _missing(runtime: Runtime) -> list[str]:
    return [each for each in _NEEDS[runtime] if importlib.util.find_spec(each) is None]


def graph_builder() -> Callable[[LearnerSpec, Tensors], bytes]:
    """Return `onnx_graph.build_graph`. Raises `ConfigError` if onnx is not installed."""
    if importlib.util.find_spec("onnx") is None:
        raise ConfigError(f"an ONNX graph needs onnx, which is not installed here: {_HOW['onnx']}")
    from stream_ctr.learn.onnx_graph import build_graph

    return build_graph


def program_builder() -> Callable[[LearnerSpec, Tensors], bytes]:
    """Return `torch_program.build_program`. Raises `ConfigError` if torch is not installed."""
    choose_runtime("torch")
    from stream_ctr.learn.torch_program import build_program

    return build_program


def make_predictor(
    spec: LearnerSpec,
    weights: Tensors,
    *,
    runtime: Runtime,
    device: str = "cpu",
    graph: bytes | None = None,
) -> Predictor:
    """Return the model that `spec` describes, with `weights`.

    `graph` is its ONNX graph if there is one. Raises `ValueError` or `RuntimeError` if weights or
    graph are not those of the model, before any memory is taken for it, and `ConfigError` if the
    runtime cannot serve it.
    """
    if spec.model == "lr":
        return ServedLinear(spec, weights)
    if runtime == "torch":
        from stream_ctr.learn.torch_predictor import torch_predictor

        return torch_predictor(spec, weights, device=device)
    from stream_ctr.learn.onnx_predictor import onnx_predictor

    return onnx_predictor(spec, weights, graph=graph)
