"""The features of a run where a person can read and copy them: `features.toml` of the state.

A new run writes what it read from its configuration or inferred from its first records. No run
reads it: a state directory goes on with the schema in its snapshots.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stream_ctr.cli.toml_text import listed, quoted
from stream_ctr.events.field import Schema
from stream_ctr.messages import one_line
from stream_ctr.snapshots.files import replace_durably

FEATURES_FILE = "features.toml"
_SHOWN_DIGITS = 6


def write_features(directory: Path, schema: Schema, *, inferred: bool) -> None:
    """Write the features of a new run. Raises `SnapshotError` if the disk does not take them."""
    lines = [*_header(inferred), *_section(schema), *_fitted(schema)]
    replace_durably(directory / FEATURES_FILE, "".join(f"{line}\n" for line in lines).encode())


def _header(inferred: bool) -> Iterator[str]:
    if inferred:
        yield "# The fields of this run, inferred from its first impressions. Numbers are taken as"
        yield "# quantities: is one of the numeric fields an id?"
    else:
        yield "# The fields of this run, as it was told to use them."
    yield "#"
    yield "# No run reads this file. To use other fields, edit a copy and begin anew:"
    yield "#"
    yield "#   stream-ctr run --config COPY --state ANOTHER_DIRECTORY ..."
    yield ""


def _section(schema: Schema) -> Iterator[str]:
    yield "[features]"
    for kind in ("categorical", "numeric"):
        yield f"{kind} = ["
        for field in schema.fields:
            if field.kind == kind:
                yield f"    {quoted(field.name)},"
        yield "]"
    yield f"numeric_encoding = {quoted(schema.numeric_encoding)}"
    yield f"buckets_per_octave = {float(schema.buckets_per_octave)}"
    yield f"hash_seed = {schema.hash_seed}"
    if schema.crosses:
        yield f"crosses = [{', '.join(listed(names) for names in schema.crosses)}]"


def _fitted(schema: Schema) -> Iterator[str]:
    if schema.bucket_edges or schema.value_scales:
        yield ""
        yield "# Fitted to the first numbers (fit_numbers); all digits are in the snapshots."
    for name, edges in schema.bucket_edges.items():
        shown = ", ".join(f"{edge:.{_SHOWN_DIGITS}g}" for edge in edges)
        yield f"#   edges of the buckets of {one_line(name, 60)}: {shown}"
    for name, scale in schema.value_scales.items():
        yield f"#   scale of {one_line(name, 60)}: {scale:.{_SHOWN_DIGITS}g}"
