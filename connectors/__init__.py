"""Sources and sinks of records: bytes and positions, with no knowledge of clicks.

`connectors` is a generic import name. It ships inside the stream-ctr wheel only, as
`stream_ctr.connectors`, and is not meant to be installed on its own.
"""

from stream_ctr.connectors.records import Records

__all__ = ["Records"]
