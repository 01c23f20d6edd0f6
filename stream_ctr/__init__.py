"""stream_ctr: learn to predict clicks while they happen.

    run             learn from a log, a source or Kafka, as `stream-ctr run` does
    config          load a configuration, print an example
    open_log, Simulation                    logs
    Source, BatchSource, Records            sources of one's own
    Subscriber, Scorer                      follow published snapshots, and predict
    topic_pointers                          what a Subscriber on another machine follows
    reports         the reports of a run as an Arrow table
    register_model  make a model of one's own known to this process

Heavy imports wait until a name is used, so that `stream-ctr --help` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream_ctr import config
    from stream_ctr.cli.runs import StopRequest
    from stream_ctr.connectors.memory import BatchSource
    from stream_ctr.connectors.records import Records
    from stream_ctr.interface import run, topic_pointers
    from stream_ctr.logs.open import open_log
    from stream_ctr.logs.simulate import Simulation
    from stream_ctr.models.registered import register_model
    from stream_ctr.snapshots.scorer import Scorer
    from stream_ctr.snapshots.snapshot_topic import Sink
    from stream_ctr.snapshots.subscriber import Subscriber
    from stream_ctr.train.report import Report
    from stream_ctr.train.report_table import reports
    from stream_ctr.train.source import Source

__version__ = "0.1.0"
__all__ = [
    "BatchSource",
    "Records",
    "Report",
    "Scorer",
    "Simulation",
    "Sink",
    "Source",
    "StopRequest",
    "Subscriber",
    "__version__",
    "config",
    "open_log",
    "register_model",
    "reports",
    "run",
    "topic_pointers",
]

_HOME = {
    "BatchSource": "connectors.memory",
    "Records": "connectors.records",
    "Report": "train.report",
    "Scorer": "snapshots.scorer",
    "Simulation": "logs.simulate",
    "Sink": "snapshots.snapshot_topic",
    "Source": "train.source",
    "StopRequest": "cli.runs",
    "Subscriber": "snapshots.subscriber",
    "open_log": "logs.open",
    "register_model": "models.registered",
    "reports": "train.report_table",
    "run": "interface",
    "topic_pointers": "interface",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"stream_ctr.{_HOME[name]}"), name)
    if name == "config":
        return importlib.import_module("stream_ctr.config")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
