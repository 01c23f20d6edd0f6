"""Write the JSON Schemas of pointer, manifest, delta and report from the types of stream-ctr.

    python docs/schemas/generate.py

The schemas are for readers in other languages. `stream-ctr` itself decodes into the types, and a
test compares the files with them.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from stream_ctr.snapshots import delta, delta_store, manifest, pointer
from stream_ctr.train import report

FOLDER = Path(__file__).parent
DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = "#/$defs/{name}"


def schemas() -> dict[str, dict[str, Any]]:
    """Return the schema of each document by the name of its file."""
    return {
        "pointer.schema.json": document(pointer.Pointer, newest=pointer.FORMAT),
        "manifest.schema.json": document(manifest.Manifest, newest=manifest.FORMAT),
        "delta.schema.json": document(delta.DeltaHeader, newest=delta.FORMAT),
        "deltas.schema.json": document(delta_store.DeltaIndex, newest=delta_store.FORMAT),
        "report.schema.json": reports(),
    }


def document(contract: type[msgspec.Struct], *, newest: int) -> dict[str, Any]:
    """Return the schema of a document that is an object of this type."""
    definitions = components(contract)
    root = with_seal(with_format(definitions.pop(contract.__name__), newest))
    return {"$schema": DIALECT, **root, "$defs": definitions}


def reports() -> dict[str, Any]:
    """Return the schema of a line of `reports.jsonl`."""
    names = ("Report", "WindowReport")
    definitions = components(report.Report, report.WindowReport)
    for name in names:
        definitions[name] = with_format(definitions[name], report.FORMAT)
    return {
        "$schema": DIALECT,
        "title": "ReportLine",
        "description": "A line of `reports.jsonl`: about a run, or about one window of event time.",
        "oneOf": [{"$ref": REFERENCE.format(name=name)} for name in names],
        "$defs": definitions,
    }


def components(*contracts: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the definitions of these types and of all that they refer to, by name."""
    _, definitions = msgspec.json.schema_components(contracts, ref_template=REFERENCE)
    return {name: readable(definition) for name, definition in sorted(definitions.items())}


def readable(definition: dict[str, Any]) -> dict[str, Any]:
    """Return a definition with its docstring as prose, and with every key that is always there.

    A default is for those who build a value in Python. The JSON has every key but those that may be
    unset, which have no default.
    """
    changed = dict(definition)
    if "description" in changed:
        changed["description"] = prose(changed["description"])
    if "properties" in changed:
        required = {*changed.get("required", [])}
        properties = {}
        for name, schema in changed["properties"].items():
            if "default" in schema:
                required.add(name)
            properties[name] = {key: value for key, value in schema.items() if key != "default"}
        changed["properties"] = properties
        changed["required"] = [name for name in properties if name in required]
    return changed


def prose(docstring: str) -> str:
    """Return a docstring in the terms of JSON, without line breaks and exceptions.

    >>> prose("A point.\\n\\n    Its x may be\\n    None.\\n\\n    Raises `ValueError` for NaN.")
    'A point. Its x may be null.'
    """
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    kept = [paragraph for paragraph in paragraphs if not paragraph.startswith("Raises ")]
    return re.sub(r"\bNone\b", "null", " ".join(" ".join(kept).split()))


def with_format(definition: dict[str, Any], newest: int) -> dict[str, Any]:
    """Return the definition for documents of one format."""
    properties = {**definition["properties"], "format": {"const": newest}}
    return {**definition, "properties": properties}


def with_seal(definition: dict[str, Any]) -> dict[str, Any]:
    """Return the definition with the last key of a document, which is none of its type."""
    sealed = {
        "description": "The SHA-256 of all bytes of the document before the comma that precedes "
        "this key, the last one.",
        "type": "string",
        "pattern": "^[0-9a-f]{64}$",
        "maxLength": 64,
    }
    return {
        **definition,
        "properties": {**definition["properties"], "sha256": sealed},
        "required": [*definition["required"], "sha256"],
    }


def main() -> None:
    for name, schema in schemas().items():
        (FOLDER / name).write_text(text(schema))


def text(schema: dict[str, Any]) -> str:
    """Return the contents of a schema's file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
