"""Where the trainer's results go: files in the state directory, and Kafka topics beside them when the input is Kafka."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stream_ctr import snapshot


class Sink(Protocol):
    """What is asked of a Kafka producer."""

    def send(
        self, topic: str, value: bytes, *, key: bytes | None = None, headers: Sequence[tuple[str, bytes]] = (), time: int | None = None
    ) -> None: ...

    def flush(self, timeout_seconds: float) -> None: ...


class Outlet:
    """Reports to `DIR/reports.jsonl`, the pointer to the newest snapshot to `DIR/latest.json`; with a `sink` also to their topics.

    Dead letters go to `<topic>.dlq` with a `sink`, else to `DIR/dead_letters.jsonl`.
    """

    def __init__(
        self, directory: Path, *, sink: Sink | None = None, metrics_topic: str = "", snapshot_topic: str = "", model_name: str = "default"
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._metrics_topic, self._snapshot_topic, self._model_name = metrics_topic, snapshot_topic, model_name

    def report(self, report: Mapping[str, object]) -> None:
        line = json.dumps(report, allow_nan=False)
        with (self._directory / "reports.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self._sink and self._metrics_topic:
            self._sink.send(self._metrics_topic, line.encode(), key=self._model_name.encode())

    def dead_letter(self, topic: str, partition: int, offset: int, value: bytes | None, reason: str, message: str) -> None:
        """The original bytes untouched, and why."""
        fields = {"topic": topic, "partition": str(partition), "offset": str(offset), "reason": reason, "message": message}
        if self._sink:
            headers = [(f"__stream_ctr.errors.{name}", text.encode("utf-8", "backslashreplace")) for name, text in fields.items()]
            self._sink.send(f"{topic}.dlq", value or b"", key=f"{topic}-{partition}-{offset}".encode(), headers=headers)
            return
        with (self._directory / "dead_letters.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**fields, "value_base64": base64.b64encode(value or b"").decode()}) + "\n")

    def publish(self, path: Path, manifest: Mapping[str, object]) -> None:
        pointer = snapshot.pointer_for(path, manifest)
        snapshot.write_pointer(self._directory / "latest.json", pointer)
        if self._sink and self._snapshot_topic:
            self._sink.send(self._snapshot_topic, json.dumps(pointer).encode(), key=self._model_name.encode())
            self._sink.flush(10.0)

    def flush(self) -> None:
        if self._sink:
            self._sink.flush(10.0)
