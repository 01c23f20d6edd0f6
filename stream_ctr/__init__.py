"""stream_ctr: learn to predict clicks while they happen.

Heavy imports wait until a name is used, so that `stream-ctr --help` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream_ctr.snapshots.scorer import Scorer
    from stream_ctr.snapshots.subscriber import Subscriber

__version__ = "0.1.0"
__all__ = ["Scorer", "Subscriber", "__version__"]


def __getattr__(name: str) -> Any:
    if name in {"Scorer", "Subscriber"}:
        from stream_ctr.snapshots import scorer, subscriber

        return {"Scorer": scorer.Scorer, "Subscriber": subscriber.Subscriber}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
