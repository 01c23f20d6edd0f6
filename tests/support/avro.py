"""Avro records of events, as fastavro writes them, and schemas in memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastavro

from stream_ctr.connectors.embedded import dies_with_parent, free_port
from stream_ctr.connectors.record_schemas import Schema
from stream_ctr.events.parsed_events import KINDS

START_SECONDS = 120.0
FEATURES: dict[str, Any] = {
    "type": "record",
    "name": "Features",
    "fields": [
        {"name": "app", "type": ["null", "string"]},
        {"name": "age", "type": ["null", "double"]},
    ],
}
EVENT: dict[str, Any] = {
    "type": "record",
    "name": "Event",
    "namespace": "ads",
    "fields": [
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": [*KINDS]}},
        {"name": "impression_id", "type": ["string", "long"]},
        {"name": "time", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "label", "type": ["null", "int"]},
        {"name": "features", "type": ["null", FEATURES]},
    ],
}


def plain(schema: Any) -> Any:
    """Return a schema without logical types, so that fastavro writes plain numbers."""
    if isinstance(schema, dict):
        return {name: plain(value) for name, value in schema.items() if name != "logicalType"}
    return [plain(branch) for branch in schema] if isinstance(schema, list) else schema


def body(schema: Any, value: Mapping[str, Any]) -> bytes:
    """Return the Avro bytes of a value, without a frame."""
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(plain(schema)), dict(value))
    return stream.getvalue()


def confluent(id: int, data: bytes) -> bytes:
    return b"\0" + struct.pack(">i", id) + data


def single_object(fingerprint: int, data: bytes) -> bytes:
    return b"\xc3\x01" + struct.pack("<Q", fingerprint) + data


class KnownSchemas:
    """Schemas by id, in memory."""

    name = "the schemas of this test"

    def __init__(self, *schemas: Any, type: str = "AVRO") -> None:
        self._schemas = [Schema(type, json.dumps(schema)) for schema in schemas]

    def by_id(self, id: int) -> Schema | None:
        return self._schemas[id] if id < len(self._schemas) else None

    def by_fingerprint(self, fingerprint: int) -> Schema | None:
        return None


class RegistryMissing(Exception):
    """No schema registry can be started here; the message is the reason to skip."""


@contextmanager
def registry(log: Path) -> Iterator[str]:
    """Run a schema registry; yield the URL of its Confluent interface.

    It is that of `REGISTRY_HOME`, or else of `../shared/registry` next to the checkout: a program
    `registry-up` that takes a port. Raises `RegistryMissing`.
    """
    next_to_checkout = Path(__file__).resolve().parents[3] / "shared" / "registry"
    program = Path(os.environ.get("REGISTRY_HOME") or next_to_checkout) / "registry-up"
    if not program.exists():
        raise RegistryMissing(f"no schema registry: there is no {program} (REGISTRY_HOME)")
    if shutil.which("java") is None:
        raise RegistryMissing("a schema registry needs java on the PATH")
    port = free_port()
    url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
    with log.open("wb") as output:
        process = subprocess.Popen(
            dies_with_parent([str(program), str(port)]), stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{url}/subjects"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RegistryMissing(
                    f"the schema registry did not start: {log.read_text()[-500:]}"
                )
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def register(url: str, subject: str, text: str, **more: object) -> int:
    """Register a schema, and return its id."""
    request = urllib.request.Request(
        f"{url}/subjects/{subject}/versions",
        data=json.dumps({"schema": text, **more}).encode(),
        headers={"Content-Type": "application/vnd.schemaregistry.v1+json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return int(json.load(response)["id"])
