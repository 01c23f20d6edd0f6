"""The pointer: a small JSON object that names the snapshot which subscribers load.

It stands in `latest.json` of a state directory and on the snapshot topic under the model's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

FORMAT = 1

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Pointer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which snapshot is published. Times are epoch milliseconds.

    `path` is absolute and ends in the snapshot's name; `manifest_sha256` is the digest of the
    bytes of its manifest. `epoch` grows with every run that holds the state directory and with
    every rollback, `sequence` with every snapshot of a state directory.

    Raises `ValueError` when `path` does not lead to a directory named `snapshot`.
    """

    format: Count = FORMAT
    model: str
    snapshot: str
    path: str
    epoch: Count
    sequence: Count
    manifest_sha256: Sha256
    examples: Count
    event_time_ms: Count
    created_ms: Count

    def __post_init__(self) -> None:
        path = Path(self.path)
        if not path.is_absolute() or path.name != self.snapshot:
            raise ValueError(
                f"pointer path {self.path!r:.200} must be absolute and end in the snapshot's name "
                f"{self.snapshot!r:.200}"
            )
