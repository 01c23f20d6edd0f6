"""Where records come from and where they go: bytes and positions, nothing of clicks.

`connectors` is a generic import name. It ships inside the stream-ctr wheel only and is not meant to be installed on its own.
"""

from stream_ctr.connectors.records import Records

__all__ = ["Records"]
